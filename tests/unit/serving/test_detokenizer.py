"""Streamed text against decoding everything at once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorax_backend.serving.tokenizer import TokenizerPool

REPLACEMENT = "\ufffd"
TEXTS = [
    "hello world, this is the end",
    "你好，世界！这是一个测试。",
    "👍🏽 family: 👨‍👩‍👧‍👦 flags 🇮🇹🇫🇷",
    "naïve café – “quotes” … €100",
    "  leading and   inner   spaces  \n\n\tand tabs\n",
    "مرحبا بالعالم Привет שלום नमस्ते",
    "\u0000\u0001 control \x7f",
]
# Derandomized so that a run of the suite is repeatable; the example count keeps this file within seconds.
PROPERTY = settings(max_examples=150, deadline=None, derandomize=True)


@pytest.fixture(scope="session", params=["byte_level", "byte_fallback"])
def tokenizer(request: pytest.FixtureRequest) -> TokenizerPool:
    return request.getfixturevalue(request.param)


def chunks(ids: list[int], sizes: list[int]) -> Iterator[list[int]]:
    start = 0
    while start < len(ids):
        size = sizes[start % len(sizes)] if sizes else 1
        yield ids[start : start + size]
        start += size


def stream(tokenizer: TokenizerPool, ids: list[int], sizes: list[int], prompt: list[int]) -> list[str]:
    detokenizer = tokenizer.detokenizer(prompt)
    pieces = [detokenizer.append(chunk) for chunk in chunks(ids, sizes)]
    return [*pieces, detokenizer.flush()]


@pytest.mark.parametrize("text", TEXTS)
def test_streaming_any_language_gives_the_text_without_half_characters(
    tokenizer: TokenizerPool, text: str
) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    pieces = stream(tokenizer, ids, [1], [])
    assert "".join(pieces) == tokenizer.decode(ids)
    assert REPLACEMENT not in "".join(pieces)


def test_real_model_vocabulary_streams_multi_byte_text(smollm2_path: str) -> None:
    real = TokenizerPool(smollm2_path)  # type: ignore[arg-type]
    for text in TEXTS:
        ids = real.encode(text)
        assert "".join(stream(real, ids, [1], real.encode("before it:"))) == text


@PROPERTY
@given(
    text=st.text(max_size=60),
    prompt=st.text(max_size=20),
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4),
)
def test_streamed_text_equals_the_full_decode(
    byte_level: TokenizerPool, byte_fallback: TokenizerPool, text: str, prompt: str, sizes: list[int]
) -> None:
    for tokenizer in (byte_level, byte_fallback):
        before = tokenizer.encode(prompt)
        ids = tokenizer.encode(text, add_special_tokens=False)
        pieces = stream(tokenizer, ids, sizes, before)
        whole = tokenizer.decode(before + ids)
        assert tokenizer.decode(before) + "".join(pieces) == whole


@PROPERTY
@given(
    ids=st.lists(st.integers(0, 383), max_size=120), sizes=st.lists(st.integers(1, 7), min_size=1, max_size=4)
)
def test_arbitrary_ids_stream_to_the_full_decode(
    byte_level: TokenizerPool, ids: list[int], sizes: list[int]
) -> None:
    # Most of these are not UTF-8 at all.
    assert "".join(stream(byte_level, ids, sizes, [])) == byte_level.decode(ids)


@PROPERTY
@given(ids=st.lists(st.integers(5, 260), max_size=200))
def test_bytes_that_never_become_characters_are_let_through_in_the_end(
    byte_fallback: TokenizerPool, ids: list[int]
) -> None:
    pieces = stream(byte_fallback, ids, [1], [])
    whole = byte_fallback.decode(ids)
    if REPLACEMENT not in whole:
        assert "".join(pieces) == whole
    assert bool("".join(pieces)) == bool(whole)


def test_a_long_run_of_broken_bytes_does_not_pile_up(byte_level: TokenizerPool) -> None:
    lone = byte_level.encode("好")[0]
    detokenizer = byte_level.detokenizer()
    shown = "".join(detokenizer.append([lone]) for _ in range(2000))
    assert len(shown) > 1900
    assert len(detokenizer._window) < 400
    assert shown + detokenizer.flush() == byte_level.decode([lone] * 2000)


def test_the_first_word_keeps_its_space_after_a_prompt_and_loses_it_without(
    byte_fallback: TokenizerPool,
) -> None:
    hello = byte_fallback.encode("hello", add_special_tokens=False)
    assert "".join(stream(byte_fallback, hello, [1], byte_fallback.encode("he said"))) == " hello"
    assert "".join(stream(byte_fallback, hello, [1], [])) == "hello"


def test_special_tokens_leave_no_text_and_keep_the_spaces_around_them(byte_fallback: TokenizerPool) -> None:
    word = byte_fallback.encode("the", add_special_tokens=False)
    ids = [*word, 3, *word, 4, 3, 4, 3, 4, 3, 4, 3, *word]
    assert "".join(stream(byte_fallback, ids, [1], [])) == byte_fallback.decode(ids) == "the the the"


def test_a_prompt_that_ends_inside_a_character_run_gives_whole_characters(
    byte_fallback: TokenizerPool,
) -> None:
    prompt = byte_fallback.encode("好" * 9, add_special_tokens=False)
    ids = byte_fallback.encode("你", add_special_tokens=False)[1:]  # without the prefix space
    assert "".join(stream(byte_fallback, ids, [1], prompt)) == "你"
