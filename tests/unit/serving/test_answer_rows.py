"""LoRAX's rules for what an answer holds, one test a row of its list (N10-N16, N30, P02-P10), and its own checks."""

from __future__ import annotations

import math
from typing import Any

import pytest

from lorax_backend.config import ServerConfig
from lorax_backend.serving.answer import AnswerBuilder, PreparedPrompt
from lorax_backend.serving.given import RawRequest
from lorax_backend.serving.parameters import parse_request
from lorax_backend.serving.prompt import Limits, encode_prompt, prepare
from lorax_backend.serving.stop import StopChecker
from lorax_backend.serving.tokenizer import TokenizerPool
from lorax_backend.types import FinishReason, GenerateRequest, GenerationEvent, TokenOutput

EOS = 2


def request_of(**parameters: Any) -> GenerateRequest:
    return parse_request(RawRequest("", {"text_input": "p"}, parameters), ServerConfig())


def builder_of(tokenizer: TokenizerPool, prompt: str = "p", **parameters: Any) -> AnswerBuilder:
    ids = tokenizer.encode(prompt)
    return AnswerBuilder(request_of(**parameters), tokenizer, PreparedPrompt(ids, prompt, None))


def finish(
    builder: AnswerBuilder, ids: list[int], reason: FinishReason | None, **first: Any
) -> GenerationEvent:
    items = [TokenOutput(1, token_id) for token_id in ids]
    items[0] = items[0]._replace(**first)
    items[-1] = items[-1]._replace(finish_reason=reason)
    event = builder.add(items)
    assert event is not None
    return event


def test_n10_length_comes_before_the_end_token_and_that_before_stop_strings(
    byte_level: TokenizerPool,
) -> None:
    ids = byte_level.encode("ab")
    assert (
        finish(builder_of(byte_level, stop='["b"]'), ids, FinishReason.LENGTH).finish_reason
        is FinishReason.LENGTH
    )
    ended = finish(builder_of(byte_level, stop='["b"]'), [*ids[:1], EOS], FinishReason.EOS)
    assert ended.finish_reason is FinishReason.EOS
    assert finish(builder_of(byte_level, stop='["b"]'), ids, None).finish_reason is FinishReason.STOP


def test_n11_end_tokens_are_the_models_and_the_tokenizers(byte_level: TokenizerPool) -> None:
    engine_request, _ = prepare(request_of(), 1, byte_level, Limits(64, 128))
    assert engine_request.sampling.stop_token_ids == byte_level.eos_token_ids
    assert EOS in byte_level.eos_token_ids


@pytest.mark.parametrize(
    ("pieces", "shown", "matched"),
    [
        (["/test;"], "/test;", True),
        (["/test", ";"], "/test;", True),
        (["/test", "; "], "/test;", True),
        (["/test", ":"], "/test:", False),
        (["a/te", "st;b"], "a/test;", True),
    ],
)
def test_z18_n12_a_stop_string_fires_on_the_full_text_wherever_it_lies(
    pieces: list[str], shown: str, matched: bool
) -> None:
    for include in (True, False):
        checker = StopChecker(["/test;"], include)
        text = "".join(checker.feed(piece) for piece in pieces) + checker.flush()
        assert (checker.matched is not None) is matched
        assert text == (shown if include or not matched else shown.replace("/test;", ""))


def test_z18_characters_with_a_meaning_in_patterns_are_ordinary_text() -> None:
    checker = StopChecker(["<|stop|>"])
    assert checker.feed("<") + checker.feed("|stop") == "<|stop"
    assert checker.matched is None
    checker.feed("|>")
    assert checker.matched == "<|stop|>"


def test_z18_the_end_token_and_the_last_allowed_token_end_an_answer(byte_level: TokenizerPool) -> None:
    ended = finish(builder_of(byte_level), [*byte_level.encode("a"), EOS], FinishReason.EOS)
    assert ended.finish_reason is FinishReason.EOS
    five = finish(builder_of(byte_level), byte_level.encode("abcde"), FinishReason.LENGTH)
    assert (five.finish_reason, five.generated_tokens) == (FinishReason.LENGTH, 5)


def test_n12_p10_the_native_text_keeps_the_stop_string_and_others_may_drop_it(
    byte_level: TokenizerPool,
) -> None:
    ids = byte_level.encode("fooEND.")
    kept = finish(builder_of(byte_level, stop='["END"]'), ids, None)
    dropped = finish(builder_of(byte_level, stop='["END"]', include_stop_str_in_output=False), ids, None)
    assert (kept.generated_text, dropped.generated_text) == ("fooEND", "foo")


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback"])
@pytest.mark.parametrize(
    "text",
    ["The quick brown fox, it's 3.14!", "你好，世界。这是一个测试", "naïve café 👍🏽 done", "a\n\n b\t"],
)
def test_z25_n13_streamed_pieces_join_to_the_exact_text_and_never_split_a_character(
    name: str, text: str, request: pytest.FixtureRequest
) -> None:
    tokenizer: TokenizerPool = request.getfixturevalue(name)
    ids = tokenizer.encode(text, add_special_tokens=False)
    detokenizer = tokenizer.detokenizer()
    pieces = [detokenizer.append([token_id]) for token_id in ids]
    assert all("\ufffd" not in piece for piece in pieces)
    assert ("".join(pieces) + detokenizer.flush()).strip() == text.strip()


def test_n15_p05_alternatives_have_the_text_they_would_add_where_they_stand(
    byte_fallback: TokenizerPool,
) -> None:
    tokenizer = byte_fallback
    prompt, answer = "hello", tokenizer.encode("hello world", add_special_tokens=False)
    world = answer[-1]
    builder = builder_of(tokenizer, prompt, return_k_alternatives=3)
    special = next(iter(tokenizer.eos_token_ids))
    tops = ((world, -0.1), (answer[0], -1.0), (special, -3.0))
    event = finish(builder, [world], FinishReason.LENGTH, logprob=-0.1, top_logprobs=tops)
    alternatives = event.tokens[0].top_logprobs
    assert alternatives is not None
    assert [logprob for _, _, logprob in alternatives] == [-0.1, -1.0, -3.0]
    assert alternatives[0][1] == event.tokens[0].text == event.text
    for token_id, text, _ in alternatives[:2]:
        whole = tokenizer.decode([*tokenizer.encode(prompt), token_id])
        assert whole == tokenizer.decode(tokenizer.encode(prompt)) + text
    assert alternatives[2][1] == tokenizer.token_text(special)


def test_n16_p03_the_prompts_tokens_have_ids_texts_and_log_probabilities_but_the_first(
    byte_level: TokenizerPool,
) -> None:
    prompt = "hello 好 world"
    builder = builder_of(byte_level, prompt, decoder_input_details=True)
    ids = byte_level.encode(prompt)
    scores = tuple(-0.25 * i for i in range(1, len(ids)))
    event = finish(builder, byte_level.encode("a"), FinishReason.LENGTH, prompt_logprobs=scores)
    assert event.prefill is not None
    assert [token.id for token in event.prefill] == ids
    assert [token.logprob for token in event.prefill] == [None, *scores]
    assert "".join(token.text for token in event.prefill if not token.special) == prompt


def test_p03_positions_that_were_not_computed_are_null(byte_level: TokenizerPool) -> None:
    builder = builder_of(byte_level, "abc", decoder_input_details=True)
    count = len(byte_level.encode("abc"))
    scores = (math.nan,) * (count - 2) + (-1.0,)
    event = finish(builder, byte_level.encode("a"), FinishReason.LENGTH, prompt_logprobs=scores)
    assert event.prefill is not None
    assert [token.logprob for token in event.prefill] == [None] * (count - 1) + [-1.0]


def test_p02_p03_the_prompts_tokens_come_only_to_those_who_asked(byte_level: TokenizerPool) -> None:
    event = finish(builder_of(byte_level, details=True), byte_level.encode("a"), FinishReason.LENGTH)
    assert event.prefill is None
    assert event.best_of_sequences is None


def test_p04_p10_special_tokens_show_in_tokens_and_not_in_the_text(byte_level: TokenizerPool) -> None:
    event = finish(
        builder_of(byte_level, return_tokens=True), [*byte_level.encode("a"), EOS], FinishReason.EOS
    )
    assert event.generated_text == "a"
    assert (event.tokens[-1].text, event.tokens[-1].special) == ("</s>", True)


def test_p07_finish_reasons_are_lorax_words() -> None:
    assert [reason.value for reason in FinishReason] == ["length", "eos_token", "stop_sequence"]


def test_p08_p09_only_the_last_event_of_a_stream_has_the_whole_text(byte_level: TokenizerPool) -> None:
    builder = builder_of(byte_level, stream=True)
    first, second = byte_level.encode("ab")
    piece = builder.add([TokenOutput(1, first)])
    assert piece is not None
    assert (piece.generated_text, piece.finish_reason, piece.final) == (None, None, False)
    last = finish(builder, [second], FinishReason.LENGTH)
    assert (last.generated_text, last.generated_tokens, last.prompt_tokens) == (
        "ab",
        2,
        builder.prompt_tokens,
    )


def test_n30_truncation_keeps_the_tail(byte_level: TokenizerPool) -> None:
    ids, _ = encode_prompt(request_of(truncate=2), byte_level)
    assert ids == byte_level.encode("p")[-2:]
