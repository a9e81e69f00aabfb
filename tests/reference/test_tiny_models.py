"""Tiny random models of every architecture against transformers and PEFT: logits within 1e-4 in float32."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from model_driver import ModelDriver

# PEFT asks transformers for an attribute that transformers has renamed, and advises against lm_head adapters of tied
# models, which users have all the same.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings:UserWarning"),
]

TOLERANCE = 1e-4
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
# Every kind of module alone and together, ranks from 1 to 64, on and off the borders of rank-8 pages.
ADAPTERS: tuple[dict[str, Any], ...] = (
    {"rank": 1, "targets": ("q_proj",)},
    {"rank": 4, "targets": ("k_proj", "o_proj"), "layers_to_transform": [1]},
    {"rank": 8, "targets": (*ATTENTION, *MLP)},
    {"rank": 12, "targets": MLP, "use_rslora": True},
    {"rank": 16, "targets": ("v_proj", "lm_head")},
    {"rank": 33, "targets": ("lm_head",)},
    {"rank": 64, "targets": (*ATTENTION, *MLP, "lm_head")},
    {
        "rank": 5,
        "targets": ("down_proj", "up_proj"),
        "rank_pattern": {"up_proj": 9},
        "alpha_pattern": {"up_proj": 3},
    },
)
MODELS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("llama", {"num_key_value_heads": 2}),
    ("llama", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    ("llama", {"num_key_value_heads": 1, "head_dim": 32, "num_hidden_layers": 3}),
    ("mistral", {"sliding_window": 7}),
    ("mistral", {"sliding_window": None, "tie_word_embeddings": True}),
    ("qwen2", {}),
    (
        "qwen2",
        {
            "tie_word_embeddings": True,
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 1,
        },
    ),
    ("qwen3", {"tie_word_embeddings": True}),
    ("qwen3", {"num_key_value_heads": 1, "head_dim": 32}),
)


class PeftReference:
    """The same model in transformers, with adapters of PEFT; None is the base model."""

    def __init__(self, model_path: Path, adapters: dict[str, Path]) -> None:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(
            model_path, dtype=torch.float32, attn_implementation="eager"
        )
        self._model = model.eval()
        for name, folder in adapters.items():
            if isinstance(self._model, PeftModel):
                self._model.load_adapter(str(folder), adapter_name=name)
            else:
                self._model = PeftModel.from_pretrained(self._model, str(folder), adapter_name=name).eval()

    @torch.inference_mode()
    def logits(self, ids: list[int], adapter: str | None) -> torch.Tensor:
        """[len(ids), vocab]"""
        if adapter is not None:
            self._model.set_adapter(adapter)
            return self._model(torch.tensor([ids])).logits[0]
        if not hasattr(self._model, "disable_adapter"):
            return self._model(torch.tensor([ids])).logits[0]
        with self._model.disable_adapter():
            return self._model(torch.tensor([ids])).logits[0]


@pytest.mark.parametrize(
    ("architecture", "options"), MODELS, ids=[f"{a}-{i}" for i, (a, _) in enumerate(MODELS)]
)
def test_logits_of_a_mixed_batch_equal_peft_for_every_architecture(
    architecture: str,
    options: dict[str, Any],
    tiny_model_path: Callable[..., Path],
    tiny_adapter: Callable[..., Path],
) -> None:
    model_path = tiny_model_path(architecture, **options)
    folders = {
        f"adapter{index}": tiny_adapter(model_path, seed=index, **adapter)
        for index, adapter in enumerate(ADAPTERS)
    }
    reference = PeftReference(model_path, folders)
    driver = ModelDriver(model_path, adapter_pages=64)
    slots: dict[str | None, int] = {None: -1} | {
        name: driver.add_adapter(path) for name, path in folders.items()
    }
    worst = _worst_difference(driver, reference, slots, random.Random(architecture + str(options)))
    assert worst < TOLERANCE


def _worst_difference(
    driver: ModelDriver, reference: PeftReference, slots: dict[str | None, int], rng: random.Random
) -> float:
    """Sequences of all adapters, fed in random chunks and mixed with decoding; compares each row of logits."""
    vocab = driver.runner.model_config.vocab_size
    texts = {}
    expected = {}
    for name in [*slots, None, "adapter6", "adapter4"]:
        ids = [rng.randrange(3, vocab) for _ in range(rng.randint(18, 45))]
        prompt = rng.randint(1, len(ids) - 4)
        seq = driver.add(ids[:prompt], slots[name])
        texts[seq.handle] = (seq, ids)
        expected[seq.handle] = reference.logits(ids, name)
    worst, compared = 0.0, 0
    live = [seq for seq, _ in texts.values()]
    while live:
        work = []
        for seq in rng.sample(live, rng.randint(1, len(live))):
            left = len(seq.token_ids) - seq.num_computed
            work.append((seq, left if left == 1 else rng.randint(1, left)))
        driver.step(work)
        for handle, logits in driver.last_logits.items():
            seq, ids = texts[handle]
            position = len(seq.token_ids) - 1
            worst = max(worst, float((logits - expected[handle][position]).abs().max()))
            compared += 1
            if len(seq.token_ids) == len(ids):
                live.remove(seq)
            else:
                seq.token_ids.append(ids[len(seq.token_ids)])
    assert compared > 4 * len(texts)
    return worst


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "dynamic", "factor": 2.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_logits_equal_transformers_for_every_rope_type(
    rope: dict[str, Any], tiny_model_path: Callable[..., Path]
) -> None:
    model_path = tiny_model_path("llama", rope_parameters=rope | {"rope_theta": 10000.0})
    rng = random.Random(3)
    ids = [rng.randrange(3, 384) for _ in range(150)]
    driver = ModelDriver(model_path)
    seq = driver.add(ids)
    driver.step([(seq, 90)])
    driver.step([(seq, 60)])
    expected = PeftReference(model_path, {}).logits(ids, None)[-1]
    assert float((driver.last_logits[seq.handle] - expected).abs().max()) < TOLERANCE


def test_a_sharded_checkpoint_gives_the_same_logits(
    tiny_model_path: Callable[..., Path], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    model_path = tiny_model_path("llama")
    AutoModelForCausalLM.from_pretrained(model_path).save_pretrained(tmp_path, max_shard_size="100KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    ids = list(range(5, 40))
    found = []
    for folder in (model_path, tmp_path):
        driver = ModelDriver(folder)
        seq = driver.add(ids)
        driver.step([(seq, len(ids))])
        found.append(driver.last_logits[seq.handle])
    assert torch.equal(*found)


def test_lm_head_adapters_of_a_tied_model_leave_the_input_embedding_alone(
    tiny_model_path: Callable[..., Path], tiny_adapter: Callable[..., Path]
) -> None:
    model_path = tiny_model_path("llama", tie_word_embeddings=True)
    driver = ModelDriver(model_path)
    before = driver.runner.weights.embedding.clone()
    slot = driver.add_adapter(tiny_adapter(model_path, rank=8, targets=("lm_head",)))
    base, tuned = driver.add(range(5, 20)), driver.add(range(5, 20), slot)
    driver.step([(base, 15), (tuned, 15)])
    assert not torch.allclose(driver.last_logits[base.handle], driver.last_logits[tuned.handle])
    assert torch.equal(driver.runner.weights.embedding, before)
