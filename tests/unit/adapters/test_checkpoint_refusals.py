"""What cannot be applied rightly is refused, by name; nothing is ignored."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import PREFIX, Base, lora_config, lora_tensors, write_adapter

from lorax_backend.errors import (
    AdapterError,
    AdapterIncompatibleError,
    AdapterNotFoundError,
    AdapterTooLargeError,
)

Q0, DOWN1 = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
Q0_A, Q0_B = f"{PREFIX}{Q0}.lora_A.weight", f"{PREFIX}{Q0}.lora_B.weight"


def refusal(
    base: Base, folder: Path, kind: type[AdapterError] = AdapterIncompatibleError, **options: Any
) -> str:
    with pytest.raises(AdapterError) as caught:
        base.load(folder, **options)
    assert type(caught.value) is kind, caught.value
    return caught.value.message


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("use_dora", True, "DoRA"),
        ("bias", "all", "bias"),
        ("bias", "lora_only", "bias"),
        ("lora_bias", True, "bias"),
        ("modules_to_save", ["lm_head"], "fully trained modules"),
        ("target_parameters", ["mlp.experts.gate_up_proj"], "bare parameters"),
        ("trainable_token_indices", [1, 2], "trained token embeddings"),
        ("trainable_token_indices", {"embed_tokens": [1]}, "trained token embeddings"),
        ("alora_invocation_tokens", [5, 6], "activated LoRA"),
        ("layer_replication", [[0, 2], [1, 3]], "replicated layers"),
        ("use_qalora", True, "QALoRA"),
        ("use_bdlora", {"nblocks": 2}, "BD-LoRA"),
        ("arrow_config", {"top_k": 3}, "Arrow"),
        ("kasa_config", {"beta": 0.1}, "KaSA"),
        ("monteclora_config", {"num_samples": 2}, "MonteCLoRA"),
        ("megatron_config", {"tensor_model_parallel_size": 2}, "Megatron"),
        ("init_lora_weights", "pissa", "base weights"),
        ("init_lora_weights", "pissa_niter_16", "base weights"),
        ("init_lora_weights", "olora", "base weights"),
        ("init_lora_weights", "corda", "base weights"),
        ("init_lora_weights", "loftq", "base weights"),
        ("init_lora_weights", "lora_ga", "base weights"),
        ("init_lora_weights", "made_up_last_week", "not known"),
        ("use_something_new", True, "not known to this server"),
        ("gain", 0.5, "not known to this server"),
        ("r", 0, "positive whole number"),
        ("r", "8", "positive whole number"),
        ("r", True, "positive whole number"),
        ("r", None, "is missing"),
        ("lora_alpha", None, "is missing"),
        ("lora_alpha", "16", "a number"),
        ("lora_alpha", float("inf"), "a number"),
        ("lora_alpha", float("nan"), "a number"),
        ("use_rslora", "yes", "true or false"),
        ("rank_pattern", ["q_proj"], "an object"),
        ("rank_pattern", {"q_proj": "8"}, "positive whole number"),
        ("alpha_pattern", {"q_proj": None}, "a number"),
        ("target_modules", 7, "a string or a list of strings"),
        ("target_modules", ["q_proj", 7], "a string or a list of strings"),
        ("target_modules", "(q_proj", "regular expression"),
        ("rank_pattern", {"q_proj[": 4}, "regular expression"),
        ("layers_to_transform", "0", "a whole number"),
        ("peft_type", "IA3", "'IA3'"),
        ("peft_type", None, "None"),
    ],
)  # fmt: skip
def test_a_config_field_that_cannot_be_honoured_is_named(
    key: str, value: Any, words: str, make_adapter: Callable[..., Path], tiny: Base
) -> None:
    message = refusal(tiny, make_adapter(modules=(Q0,), **{key: value}))
    assert key in message
    assert words in message


@pytest.mark.parametrize("unset", [None, False, [], {}, "", 0, 0.0])
@pytest.mark.parametrize("key", ["use_dora", "modules_to_save", "layer_replication", "from_the_future"])
def test_a_field_that_is_unset_is_no_reason_to_refuse(
    key: str, unset: Any, make_adapter: Callable[..., Path], tiny: Base
) -> None:
    assert tiny.load(make_adapter(**{key: unset})).rank == 4


def test_the_config_of_every_example_adapter_is_fully_understood(adapters_path: Path, smollm2: Base) -> None:
    for folder in adapters_path.iterdir():
        assert smollm2.load(folder).modules


EXTRA_TENSORS = {
    f"{PREFIX}model.embed_tokens.lora_embedding_A": "embedding",
    f"{PREFIX}{Q0}.lora_magnitude_vector": "DoRA",
    f"{PREFIX}{Q0}.lora_magnitude_vector.weight": "DoRA",
    f"{PREFIX}{Q0}.lora_B.bias": "lora_bias",
    f"{PREFIX}lm_head.modules_to_save.weight": "modules_to_save",
    f"{PREFIX}lm_head.weight": "save_embedding_layers=False",
    f"{PREFIX}lm_head.base_layer.weight": "save_embedding_layers=False",
    f"{PREFIX}model.embed_tokens.weight": "save_embedding_layers=False",
    f"{PREFIX}model.embed_tokens.trainable_tokens_delta": "trainable_token_indices",
    f"{PREFIX}{Q0}.lora_diag.weight": "KaSA",
    f"{PREFIX}{Q0}.lora_C.weight": "not a LoRA weight",
    "step": "not a LoRA weight",
}


@pytest.mark.parametrize(("name", "words"), EXTRA_TENSORS.items())
def test_a_tensor_that_is_left_over_is_named(name: str, words: str, tmp_path: Path, tiny: Base) -> None:
    tensors = {**lora_tensors(tiny.targets, [Q0]), name: torch.zeros(4, 4)}
    message = refusal(tiny, write_adapter(tmp_path, lora_config([Q0]), tensors))
    assert name in message
    assert words in message


def test_modules_the_base_cannot_have_are_named_with_those_it_can(tmp_path: Path, tiny: Base) -> None:
    tensors = lora_tensors(tiny.targets, [Q0])
    strange = {name.replace("q_proj", "c_attn"): tensor for name, tensor in tensors.items()}
    message = refusal(tiny, write_adapter(tmp_path, lora_config([Q0], target_modules=["c_attn"]), strange))
    assert "'c_attn'" in message
    assert "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, lm_head" in message


def test_a_layer_the_base_does_not_have_is_refused(tmp_path: Path, tiny: Base) -> None:
    tensors = {
        name.replace("layers.0", "layers.40"): t for name, t in lora_tensors(tiny.targets, [Q0]).items()
    }
    message = refusal(tiny, write_adapter(tmp_path, lora_config([Q0]), tensors))
    assert "layers.40.self_attn.q_proj" in message
    assert "for another model" in message


@pytest.mark.parametrize(
    "name", ["vision_tower.layers.0.self_attn.q_proj", "model.vision_model.model.layers.0.self_attn.q_proj"]
)
def test_a_vision_towers_layers_are_not_taken_for_the_language_models(
    name: str, tmp_path: Path, tiny: Base
) -> None:
    tensors = {key.replace(Q0, name): tensor for key, tensor in lora_tensors(tiny.targets, [Q0]).items()}
    assert name in refusal(tiny, write_adapter(tmp_path, lora_config([Q0]), tensors))


@pytest.mark.parametrize(
    ("part", "shape", "expected"),
    [
        (Q0_A, (4, 31), "[rank, 32], found [4, 31]"),
        (Q0_A, (32,), "[rank, 32], found [32]"),
        (Q0_A, (4, 32, 1), "[rank, 32], found [4, 32, 1]"),
        (Q0_A, (0, 32), "[rank, 32], found [0, 32]"),
        (Q0_B, (33, 4), "[32, rank], found [33, 4]"),
        (Q0_B, (4, 32), "[32, rank], found [4, 32]"),
        (Q0_B, (32, 5), "rank is 5, but that of the lora_A beside it is 4"),
    ],
)
def test_a_wrong_shape_is_told_with_the_right_one(
    part: str, shape: tuple[int, ...], expected: str, tmp_path: Path, tiny: Base
) -> None:
    tensors = {**lora_tensors(tiny.targets, [Q0]), part: torch.zeros(shape)}
    message = refusal(tiny, write_adapter(tmp_path, lora_config([Q0]), tensors))
    assert part in message
    assert expected in message


def test_an_adapter_of_a_wider_model_is_refused(adapters_path: Path, tiny: Base) -> None:
    message = refusal(tiny, adapters_path / "ticket-label")
    assert "the base model needs shape [rank, 32], found [8, 576]" in message
    assert "no q_proj at this place" in message, "layers 3 to 29"


@pytest.mark.parametrize(("missing", "left", "told"), [(Q0_A, Q0_B, "no lora_A"), (Q0_B, Q0_A, "no lora_B")])
def test_a_missing_partner_is_named(missing: str, left: str, told: str, tmp_path: Path, tiny: Base) -> None:
    tensors = lora_tensors(tiny.targets, [Q0, DOWN1])
    del tensors[missing]
    message = refusal(tiny, write_adapter(tmp_path, lora_config([Q0, DOWN1]), tensors))
    assert left in message
    assert told in message


def test_the_same_weight_under_two_names_is_refused(tmp_path: Path, tiny: Base) -> None:
    tensors = lora_tensors(tiny.targets, [Q0])
    tensors[Q0_A.replace(".weight", ".default.weight")] = torch.ones(4, 32)
    assert "the same lora_A" in refusal(tiny, write_adapter(tmp_path, lora_config([Q0]), tensors))


def test_a_rank_other_than_the_configured_one_is_refused(
    make_adapter: Callable[..., Path], tiny: Base
) -> None:
    assert "rank is 4, but r and rank_pattern" in refusal(tiny, make_adapter(r=8))
    assert "say 2" in refusal(tiny, make_adapter("other", rank_pattern={"q_proj": 2}))


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": ["down_proj"]},
        {"target_modules": ["_proj"]},
        {"target_modules": r".*\.down_proj"},
        {"exclude_modules": ["q_proj"]},
        {"layers_to_transform": [1, 2]},
        {"layers_to_transform": [0, 1], "layers_pattern": "blocks"},
    ],
)
def test_weights_the_config_does_not_choose_are_refused(
    changes: dict[str, Any], make_adapter: Callable[..., Path], tiny: Base
) -> None:
    message = refusal(tiny, make_adapter(**changes))
    assert Q0_A in message
    assert "not chosen by target_modules" in message


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("part", [Q0_A, Q0_B])
def test_a_weight_that_is_no_number_is_refused(part: str, bad: float, tmp_path: Path, tiny: Base) -> None:
    tensors = lora_tensors(tiny.targets, [Q0, DOWN1], rank=12)
    tensors[part][3, 9] = bad
    message = refusal(tiny, write_adapter(tmp_path, lora_config([Q0, DOWN1], 12), tensors))
    assert part in message
    assert "NaN or infinity" in message
    assert DOWN1 not in message


def test_a_weight_beyond_the_range_of_the_served_dtype_is_refused(tmp_path: Path, tiny: Base) -> None:
    tensors = lora_tensors(tiny.targets, [Q0])
    tensors[Q0_B][0, 0] = 60000.0
    folder = write_adapter(tmp_path, lora_config([Q0]), tensors)  # alpha / r = 2
    assert "infinity as float16" in refusal(tiny, folder, dtype=torch.float16)
    assert tiny.load(folder, torch.bfloat16).rank == 4


def test_a_rank_above_the_limit_is_too_large(make_adapter: Callable[..., Path], tiny: Base) -> None:
    message = refusal(tiny, make_adapter(rank=17), AdapterTooLargeError, max_rank=16)
    assert "rank 17" in message
    assert "max_lora_rank 16" in message
    assert tiny.load(make_adapter("fits", rank=16), max_rank=16).num_pages == 2


def test_an_integer_tensor_is_refused(tmp_path: Path, tiny: Base) -> None:
    tensors = {**lora_tensors(tiny.targets, [Q0]), Q0_A: torch.ones(4, 32, dtype=torch.int8)}
    assert "dtype I8" in refusal(tiny, write_adapter(tmp_path, lora_config([Q0]), tensors))


def test_all_problems_are_told_at_once(tmp_path: Path, tiny: Base) -> None:
    modules = [module for module in tiny.targets if module.endswith(("q_proj", "down_proj"))]
    tensors = lora_tensors(tiny.targets, modules, rank=80)
    tensors[f"{PREFIX}{Q0}.lora_magnitude_vector"] = torch.ones(32)
    tensors[f"{PREFIX}{DOWN1}.lora_A.weight"] = torch.ones(80, 7)
    config = lora_config(modules, 80, bias="all", use_qalora=True, surprise=1, r=79)
    message = refusal(tiny, write_adapter(tmp_path, config, tensors))
    for words in (
        "bias:",
        "use_qalora:",
        "surprise:",
        "lora_magnitude_vector",
        "found [80, 7]",
        "max_lora_rank",
        "79",
    ):
        assert words in message, words


def test_a_problem_of_many_tensors_is_told_once(tmp_path: Path, tiny: Base) -> None:
    modules = [module for module in tiny.targets if "layers" in module]
    tensors = lora_tensors(tiny.targets, modules, rank=4)
    message = refusal(tiny, write_adapter(tmp_path, lora_config(modules, 8), tensors))
    assert message.count("its rank is 4") == 1
    assert f"and {len(modules) - 3} more" in message


@pytest.mark.parametrize("length", [0, 5, 40, 200, -1])
def test_a_truncated_file_is_refused(length: int, make_adapter: Callable[..., Path], tiny: Base) -> None:
    folder = make_adapter()
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:length])
    message = refusal(tiny, folder)
    assert "adapter_model.safetensors" in message
    assert "truncated" in message


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x04\x95pickle",
        struct.pack("<Q", 1 << 62) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 8) + b'{"a": 1}',
        json.dumps({"not": "safetensors"}).encode(),
    ],
)
def test_a_file_that_is_not_safetensors_is_refused(
    data: bytes, make_adapter: Callable[..., Path], tiny: Base
) -> None:
    folder = make_adapter()
    (folder / "adapter_model.safetensors").write_bytes(data)
    assert "not safetensors" in refusal(tiny, folder)


def test_a_pickle_is_never_opened(tmp_path: Path, tiny: Base) -> None:
    folder = write_adapter(tmp_path, lora_config([Q0]), None)
    (folder / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'touch /nowhere'\ntR.")
    message = refusal(tiny, folder)
    assert "adapter_model.bin is a pickle" in message
    assert "safe_serialization=True" in message


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"LORA"', "\xff", "[" * 100_000])
def test_a_broken_config_is_refused(text: str, make_adapter: Callable[..., Path], tiny: Base) -> None:
    folder = make_adapter()
    (folder / "adapter_config.json").write_text(text, encoding="latin-1")
    assert "adapter_config.json" in refusal(tiny, folder)


def test_a_huge_config_is_not_read(make_adapter: Callable[..., Path], tiny: Base) -> None:
    folder = make_adapter()
    (folder / "adapter_config.json").write_text('{"a": "' + "x" * (5 << 20) + '"}')
    assert "larger than" in refusal(tiny, folder)


def test_a_folder_without_config_or_weights_is_no_adapter(tmp_path: Path, tiny: Base) -> None:
    no_config = write_adapter(tmp_path / "a", None, lora_tensors(tiny.targets, [Q0]))
    assert "adapter_config.json" in refusal(tiny, no_config, AdapterNotFoundError)
    no_weights = write_adapter(tmp_path / "b", lora_config([Q0]), None)
    assert "adapter_model.safetensors" in refusal(tiny, no_weights, AdapterNotFoundError)
    assert "nothing-here" in refusal(tiny, tmp_path / "nothing-here", AdapterNotFoundError)


def test_a_file_without_weights_is_refused(tmp_path: Path, tiny: Base) -> None:
    assert "no LoRA weights" in refusal(tiny, write_adapter(tmp_path, lora_config([Q0]), {}))


@pytest.mark.parametrize("pattern", [r"(a|a)*(_|[a-z]|\.|\d)*!", r"(.*)*\d{3}x", r"(([a-z_.0-9])+)+!"])
def test_a_hostile_pattern_costs_little_and_is_refused(
    pattern: str, make_adapter: Callable[..., Path], tiny: Base
) -> None:
    message = refusal(tiny, make_adapter(target_modules=pattern))
    assert "target_modules: " in message or "not chosen by target_modules" in message


def test_weights_replaced_after_the_check_are_noticed(make_adapter: Callable[..., Path], tiny: Base) -> None:
    folder = make_adapter(rank=4)
    plan = tiny.inspector().inspect(folder)
    make_adapter(rank=6)
    with pytest.raises(AdapterIncompatibleError, match="changed while it was read"):
        plan.load()
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterIncompatibleError, match="vanished"):
        plan.load()


def test_weights_of_the_same_shape_replaced_after_the_check_are_not_taken_for_the_checked_ones(
    make_adapter: Callable[..., Path], tiny: Base
) -> None:
    folder = make_adapter(seed=1)
    plan = tiny.inspector().inspect(folder)
    os.utime(make_adapter(seed=2) / "adapter_model.safetensors", ns=(1, 1))
    with pytest.raises(AdapterIncompatibleError, match="changed while it was read; try again"):
        plan.load()
