"""Events built from tokens, without threads."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from lorax_backend.serving.answer import AnswerBuilder, PreparedPrompt
from lorax_backend.serving.tokenizer import TokenizerPool
from lorax_backend.types import (
    FinishReason,
    GenerateRequest,
    GenerationEvent,
    OutputOptions,
    SamplingParams,
    TokenOutput,
)

EOS = 2


def build(tokenizer: TokenizerPool, **fields: Any) -> AnswerBuilder:
    values: dict[str, Any] = {"stream": True, "outputs": OutputOptions(tokens=True)} | fields
    request = GenerateRequest("", SamplingParams(max_new_tokens=100), prompt="p", **values)
    return AnswerBuilder(request, tokenizer, PreparedPrompt(tokenizer.encode("p"), "", None))


def outputs(ids: list[int], finish: FinishReason | None = None, **fields: Any) -> list[TokenOutput]:
    items = [TokenOutput(1, token_id, **fields) for token_id in ids]
    if finish is not None:
        items[-1] = items[-1]._replace(finish_reason=finish)
    return items


def must(event: GenerationEvent | None) -> GenerationEvent:
    assert event is not None
    return event


def test_token_texts_join_to_the_text_and_special_tokens_show_only_there(byte_level: TokenizerPool) -> None:
    builder = build(byte_level)
    ids = [*byte_level.encode("a 好"), EOS]
    event = must(builder.add(outputs(ids, FinishReason.EOS)))
    assert event.text == event.generated_text == "a 好"
    assert [token.text for token in event.tokens][-4:] == ["", "", "好", "</s>"]
    assert [token.special for token in event.tokens][-1]
    assert "".join(token.text for token in event.tokens if not token.special) == "a 好"


def test_an_incomplete_character_waits_without_tokens_asked_and_shows_ids_with_them(
    byte_level: TokenizerPool,
) -> None:
    first, *rest = byte_level.encode("好")
    plain = build(byte_level, outputs=OutputOptions())
    assert plain.add(outputs([first])) is None
    assert must(plain.add(outputs(rest))).text == "好"
    detailed = build(byte_level)
    event = must(detailed.add(outputs([first])))
    assert (event.text, len(event.tokens)) == ("", 1)


def test_an_unfinished_character_at_the_end_becomes_a_replacement_character(
    byte_level: TokenizerPool,
) -> None:
    first = byte_level.encode("好")[0]
    event = must(build(byte_level).add(outputs([first], FinishReason.LENGTH)))
    assert event.text == "\ufffd"


def test_tokens_after_the_stop_string_are_neither_counted_nor_shown(byte_level: TokenizerPool) -> None:
    builder = build(byte_level, stop=("bc",))
    event = must(builder.add(outputs(byte_level.encode("abcdef"))))
    assert event.finish_reason is FinishReason.STOP
    assert builder.stopped
    assert (event.text, event.generated_tokens, len(event.tokens)) == ("abc", 3, 3)


def test_a_stop_string_inside_the_last_token_cuts_that_tokens_text(byte_level: TokenizerPool) -> None:
    world = byte_level.encode(" world")
    assert len(world) == 1
    event = must(build(byte_level, stop=("or",)).add(outputs(world)))
    assert event.text == " wor"
    assert event.tokens[0].text == " wor"


def test_length_and_end_of_sequence_win_over_a_stop_string_on_the_same_token(
    byte_level: TokenizerPool,
) -> None:
    builder = build(byte_level, stop=("b",))
    event = must(builder.add(outputs(byte_level.encode("ab"), FinishReason.LENGTH)))
    assert event.finish_reason is FinishReason.LENGTH
    assert not builder.stopped
    assert event.text == "ab"


def test_stop_strings_wait_for_the_least_number_of_tokens(byte_level: TokenizerPool) -> None:
    builder = build(byte_level, stop=("b",))
    builder._request.sampling = replace(builder._request.sampling, min_new_tokens=2)
    event = must(builder.add(outputs(byte_level.encode("abcb!"))))
    assert event.text == "abcb"


@pytest.mark.parametrize("stream", [True, False])
def test_text_held_back_for_a_stop_string_is_shown_at_the_end(
    byte_level: TokenizerPool, stream: bool
) -> None:
    builder = build(byte_level, stop=("END",), include_stop_str_in_output=False, stream=stream)
    events = [builder.add(outputs(byte_level.encode("aEN")))]
    events.append(builder.add(outputs([EOS], FinishReason.EOS)))
    assert "".join(event.text for event in events if event is not None) == "aEN"
    assert must(events[-1]).generated_text == "aEN"


def test_log_probabilities_add_up_and_alternatives_have_texts(byte_level: TokenizerPool) -> None:
    builder = build(byte_level)
    a, b = byte_level.encode("ab")
    builder.add(outputs([a], logprob=-0.5, top_logprobs=((a, -0.5), (b, -1.0))))
    event = must(builder.add(outputs([b], FinishReason.LENGTH, logprob=-0.25)))
    assert event.cumulative_logprob == -0.75
    first = build(byte_level)
    tokens = must(first.add(outputs([a], top_logprobs=((a, -0.5), (b, -1.0))))).tokens
    assert tokens[0].top_logprobs == ((a, "a", -0.5), (b, "b", -1.0))


def test_an_end_token_that_is_ordinary_text_is_not_part_of_the_answer(byte_level: TokenizerPool) -> None:
    a, dot = byte_level.encode("a.")
    event = must(build(byte_level).add(outputs([a, dot], FinishReason.EOS)))
    assert event.generated_text == "a"
    assert event.generated_tokens == 2


def test_the_first_output_tells_how_much_of_the_prompt_was_cached(byte_level: TokenizerPool) -> None:
    builder = build(byte_level)
    assert must(builder.add(outputs([byte_level.encode("a")[0]], cached_tokens=16))).cached_tokens == 16
