"""The tokenizer of a model folder against transformers', and its odd folders."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lorax_backend.errors import ValidationError
from lorax_backend.serving.tokenizer import TokenizerPool

TEXTS = ["hello world", "  two  spaces ", "你好 👍🏽 naïve", "a</s>b<|im_end|>", "line\n\nbreak\t", ""]


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_ids_and_texts_equal_those_of_transformers(tiny_model_path: Callable[..., Path], kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    folder = tiny_model_path(tokenizer=kind)
    ours, theirs = TokenizerPool(folder), transformers.AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        for special in (True, False):
            assert ours.encode(text, special) == theirs(text, add_special_tokens=special).input_ids
        ids = ours.encode(text)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": " u "}]
    rendered = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert ours.render_chat(messages) == rendered


@pytest.mark.parametrize(
    ("flags", "wrapped"),
    [
        ({"add_bos_token": True}, (True, False)),
        ({"add_bos_token": True, "add_eos_token": True}, (True, True)),
        ({"add_bos_token": False}, (False, False)),
        ({}, (False, False)),
    ],
)
def test_the_config_decides_about_begin_and_end_tokens(
    tiny_model_path: Callable[..., Path], tmp_path: Path, flags: dict[str, bool], wrapped: tuple[bool, bool]
) -> None:
    source = tiny_model_path()
    (tmp_path / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
    config = json.loads((source / "tokenizer_config.json").read_text()) | flags
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = TokenizerPool(tmp_path)
    plain = tokenizer.encode("hello", add_special_tokens=False)
    before, after = wrapped
    assert tokenizer.encode("hello") == [*([1] if before else []), *plain, *([2] if after else [])]


def test_end_tokens_are_those_of_the_generation_config_and_the_tokenizers(
    tiny_model_path: Callable[..., Path], tmp_path: Path
) -> None:
    source = tiny_model_path()
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        (tmp_path / name).write_bytes((source / name).read_bytes())
    assert TokenizerPool(tmp_path).eos_token_ids == (2,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [4, 3]}')
    assert TokenizerPool(tmp_path).eos_token_ids == (4, 3, 2)


@pytest.mark.parametrize("config", ['{"eos_token_id": 0}', '{"eos_token_id": [0]}'])
def test_z18_an_end_token_may_have_the_id_zero(
    tiny_model_path: Callable[..., Path], tmp_path: Path, config: str
) -> None:
    (tmp_path / "tokenizer.json").write_bytes((tiny_model_path() / "tokenizer.json").read_bytes())
    (tmp_path / "generation_config.json").write_text(config)
    assert TokenizerPool(tmp_path).eos_token_ids == (0,)


def test_the_models_vocabulary_bounds_the_ids(tiny_model_path: Callable[..., Path], tmp_path: Path) -> None:
    source = tiny_model_path()
    (tmp_path / "config.json").write_text('{"vocab_size": 512}')
    assert TokenizerPool(source).vocab_size == 384
    assert TokenizerPool(source, tmp_path).vocab_size == 512
    assert TokenizerPool(source, tmp_path).token_text(500) == ""


def test_truncation_and_padding_of_the_file_are_switched_off(
    tiny_model_path: Callable[..., Path], tmp_path: Path
) -> None:
    content = json.loads((tiny_model_path() / "tokenizer.json").read_text())
    content["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    content["padding"] = {
        "strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
        "pad_type_id": 0, "pad_token": "<pad>",
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert len(TokenizerPool(tmp_path).encode("abcdef")) == 6


def test_special_tokens_show_in_token_text_only(byte_level: TokenizerPool) -> None:
    assert byte_level.token_text(2) == "</s>"
    assert byte_level.decode([2]) == ""
    assert 2 in byte_level.special_ids


def test_many_threads_share_one_tokenizer(byte_level: TokenizerPool) -> None:
    texts = [f"text {i} 你好" for i in range(200)]
    alone = [byte_level.encode(text) for text in texts]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(byte_level.encode, texts)) == alone


def test_a_lone_surrogate_is_refused(byte_level: TokenizerPool) -> None:
    with pytest.raises(ValidationError, match="Unicode"):
        byte_level.encode("a\ud800")


def test_a_folder_without_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json"):
        TokenizerPool(tmp_path)


def test_serving_needs_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; import lorax_backend.serving.service, lorax_backend.serving.local;"
        "import tokenizers, jinja2; print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert run.stdout.strip() == "[]"


def test_pieces_show_the_vocabularys_spelling_and_character_offsets(byte_level: TokenizerPool) -> None:
    text = "héllo 好 world"
    pieces = byte_level.pieces(text, add_special_tokens=False)
    assert [piece["id"] for piece in pieces] == byte_level.encode(text, add_special_tokens=False)
    for piece in pieces:
        assert set(piece) == {"id", "text", "start", "stop"}
        assert 0 <= piece["start"] <= piece["stop"] <= len(text)
    ends = [piece["stop"] for piece in pieces]
    assert ends == sorted(ends)
    assert ends[-1] == len(text)
    with pytest.raises(ValidationError, match="surrogate"):
        byte_level.pieces("\ud800")
