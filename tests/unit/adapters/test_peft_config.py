"""Module choice, ranks and scaling by the rules of PEFT's own functions."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from lorax_backend.adapters.peft_config import PeftConfig, parse_peft_config

KINDS = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"]
MODULES = [f"model.layers.{layer}.{kind}" for layer in (0, 1, 2, 10, 11) for kind in KINDS] + ["lm_head"]

names = st.sampled_from(
    [
        "q_proj",
        "k_proj",
        "proj",
        "self_attn.o_proj",
        "lm_head",
        "model.layers.1.mlp.down_proj",
        "1.mlp.gate_proj",
        "mlp",
    ]
)
patterns = st.sampled_from(
    [
        "q_proj",
        "o_proj",
        "lm_head",
        "proj",
        "layers.1.mlp.down_proj",
        "1.self_attn.q_proj",
        r".*mlp\..*",
        r".*_proj$",
        r"^model\.layers\.(1|10)\..*",
        r"model.layers.\d.self_attn.(q|k)_proj",
        r"layers\.[^.]*\.mlp\.gate_proj",
    ]
)


def parse(**changes: Any) -> PeftConfig:
    config, problems = parse_peft_config({"peft_type": "LORA", "r": 4, "lora_alpha": 8, **changes})
    assert not problems
    assert config is not None
    return config


@given(
    target=st.lists(names, min_size=1, max_size=4) | patterns,
    exclude=st.none() | st.lists(names, max_size=2) | patterns,
    layers=st.none() | st.lists(st.sampled_from([0, 1, 10]), max_size=3) | st.sampled_from([0, 2, 11]),
    layers_pattern=st.none() | st.sampled_from(["layers", "blocks", r"l\w+", ["h", "layers"]]),
)
def test_modules_are_chosen_as_peft_chooses_them(
    target: Any, exclude: Any, layers: Any, layers_pattern: Any
) -> None:
    if isinstance(target, str) or layers is None:
        layers = layers_pattern = None  # PEFT refuses the combination
    options = {
        "target_modules": target,
        "exclude_modules": exclude,
        "layers_to_transform": layers,
        "layers_pattern": layers_pattern,
    }
    reference = LoraConfig(r=4, lora_alpha=8, **options)
    config = parse(**options)
    for module in MODULES:
        found = check_target_module_exists(reference, module)
        chosen = found is True or isinstance(
            found, re.Match
        )  # otherwise None, False or a mark for "excluded"
        assert config.selects(module) == chosen, module


@given(
    ranks=st.dictionaries(patterns, st.integers(1, 64), max_size=4),
    alphas=st.dictionaries(patterns, st.integers(1, 64), max_size=4),
    rslora=st.booleans(),
)
def test_ranks_and_scaling_follow_pefts_patterns(
    ranks: dict[str, int], alphas: dict[str, int], rslora: bool
) -> None:
    config = parse(rank_pattern=ranks, alpha_pattern=alphas, use_rslora=rslora)
    for module in MODULES:
        rank = ranks.get(get_pattern_key(ranks.keys(), module), 4)
        alpha = alphas.get(get_pattern_key(alphas.keys(), module), 8)
        assert config.rank_for(module) == rank
        assert config.scaling_for(module, rank) == pytest.approx(
            alpha / (rank**0.5 if rslora else rank), rel=1e-12
        )


def test_all_linear_means_all_but_the_output_layer() -> None:
    config = parse(target_modules="all-linear")
    assert config.selects("model.layers.0.mlp.down_proj")
    assert not config.selects("lm_head")


def test_no_target_modules_means_what_is_in_the_file() -> None:
    assert all(parse().selects(module) for module in MODULES)
