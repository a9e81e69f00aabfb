"""Loading checkpoints: fused layers, progress, random weights, and errors that list what is wrong."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorax_backend.model.config import ModelConfig
from lorax_backend.model.layers import Linear, packing_supported
from lorax_backend.model.weights import ModelWeights, dummy_weights, load_weights

CPU = torch.device("cpu")


@pytest.fixture
def folder(tiny_model_path: Callable[..., Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model_path("qwen2"), tmp_path / "model"))


def load(
    folder: Path, dtype: torch.dtype = torch.float32, progress: Callable[[str], None] | None = None
) -> ModelWeights:
    return load_weights(folder, ModelConfig.from_folder(folder), dtype, CPU, progress)


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_layers_with_a_common_input_are_stacked_in_slice_order(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    layer = load(folder).layers[1]
    parts = [tensors[f"model.layers.1.self_attn.{name}_proj.weight"] for name in "qkv"]
    assert layer.qkv.weight is not None
    assert torch.equal(layer.qkv.weight, torch.cat(parts))
    biases = [tensors[f"model.layers.1.self_attn.{name}_proj.bias"] for name in "qkv"]
    assert layer.qkv.bias is not None
    assert torch.equal(layer.qkv.bias, torch.cat(biases))
    gate_up = [tensors[f"model.layers.1.mlp.{name}_proj.weight"] for name in ("gate", "up")]
    assert layer.gate_up.weight is not None
    assert torch.equal(layer.gate_up.weight, torch.cat(gate_up))


def test_packed_layers_give_the_same_result_for_any_number_of_rows() -> None:
    if not packing_supported():
        pytest.skip("this build of torch has no packed linear layer")
    torch.manual_seed(0)
    plain = Linear(torch.randn(70, 48), torch.randn(70))
    packed = Linear(plain.weight.clone(), plain.bias)  # type: ignore[union-attr]
    packed.pack()
    assert packed.weight is None
    for rows in (1, 2, 7, 64, 300):
        x = torch.randn(rows, 48)
        torch.testing.assert_close(packed(x), plain(x), rtol=1e-5, atol=1e-5)


def test_progress_is_told_in_growing_steps_up_to_the_end(folder: Path) -> None:
    told: list[str] = []
    load(folder, progress=told.append)
    percents = [int(line.split("%")[0].rsplit(" ", 1)[1]) for line in told]
    assert percents == sorted(set(percents))
    assert percents[-1] == 100


def test_every_problem_of_a_checkpoint_is_listed_at_once(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.layers.0.self_attn.k_proj.bias"]
        tensors["model.layers.0.self_attn.sinks"] = torch.zeros(4)
        tensors["model.norm.weight"] = torch.zeros(7)

    rewrite(folder, change)
    with pytest.raises(ValueError, match="does not fit") as refused:
        load(folder)
    text = str(refused.value)
    assert "missing: model.layers.0.self_attn.k_proj.bias" in text
    assert "unexpected: model.layers.0.self_attn.sinks" in text
    assert "model.norm.weight is [7], the config says [64]" in text


def test_tensors_that_can_be_derived_are_not_unexpected(
    tiny_model_path: Callable[..., Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_model_path("llama", tie_word_embeddings=True), tmp_path / "model"))

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)

    rewrite(folder, change)
    weights = load(folder)
    assert weights.lm_head.weight is weights.embedding


def test_a_file_that_was_cut_off_is_named(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"model\.safetensors: broken or cut off"):
        load(folder)


def test_missing_weight_files_are_named(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="no safetensors weights found"):
        load(folder)
    (folder / "pytorch_model.bin").touch()
    with pytest.raises(ValueError, match=r"convert its \.bin files"):
        load(folder)
    (folder / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "model-00001-of-00002.safetensors"}}'
    )
    with pytest.raises(ValueError, match="model-00001-of-00002"):
        load(folder)


def test_weights_are_converted_to_the_dtype_asked_for(folder: Path) -> None:
    weights = load(folder, torch.bfloat16)
    down = weights.layers[0].down.weight
    assert down is not None
    assert {weights.embedding.dtype, weights.norm.dtype, down.dtype} == {torch.bfloat16}
    assert weights.nbytes == load(folder).nbytes // 2


def test_random_weights_repeat_with_the_seed_and_need_no_files(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    config = ModelConfig.from_folder(folder)
    one, same, other = (dummy_weights(config, torch.float32, CPU, seed) for seed in (1, 1, 2))
    assert torch.equal(one.embedding, same.embedding)
    assert not torch.equal(one.embedding, other.embedding)
    assert torch.equal(one.norm, torch.ones(64))
    assert 0.015 < float(one.embedding.std()) < 0.025
