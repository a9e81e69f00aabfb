"""`lorax-triton chat` in a terminal and through a pipe, against a fake server."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fake_triton_server import Call, FakeTriton, answer, error_json, error_response, response, token
from terminal import WAIT_S, Terminal

from lorax_backend.cli.chat import timings_text
from lorax_triton import FinishReason, StreamDetails

INFO = {"model_id": "tiny", "has_chat_template": True}


class Model:
    """Answers with the adapter and the number of messages; says no more after 'slowly'; refuses 'fail', and the
    adapters 'wrong' and 'busy'; never comes to an end with the adapter 'slow'."""

    def __init__(self, info: dict[str, Any]) -> None:
        self.info = info
        self.fake = FakeTriton(self._script)

    def _script(self, call: Call) -> Iterator[Any]:
        if "control" in call.inputs:
            command = json.loads(call.inputs["control"][0])["command"]
            row = {"id": "pirate", "source": "hub", "status": "on_device", "rank": 8, "bytes": 2048}
            reply = {"adapters": [row]} if command == "adapters" else self.info
            yield response(True, details=[json.dumps(reply)])
            return
        messages = self.messages(call)
        text = messages[-1]["content"]
        adapter = call.inputs.get("adapter_id", ["base"])[0]
        if adapter.startswith("wrong"):
            yield error_response(error_json("hub:wrong does not exist", "adapter_not_found", 404))
        elif adapter == "busy" and self.is_check(call):
            yield error_response(error_json("too many requests", "overloaded", 429))
        elif adapter == "slow":
            call.over.wait(WAIT_S)
        elif text == "fail":
            yield error_response(error_json("the adapter is broken", "adapter_error", 424))
        elif text == "slowly":
            yield response(text_output=["it be"], tokens=[token(1, "it be")])
            call.over.wait(WAIT_S)
        else:
            yield from answer(f"{adapter} saw ", f"{len(messages)}", "")

    def messages(self, call: Call) -> list[dict[str, str]]:
        if "text_input" in call.inputs:
            return [{"role": "user", "content": call.inputs["text_input"][0]}]
        parsed: list[dict[str, str]] = json.loads(call.inputs["messages"][0])
        return parsed

    def is_check(self, call: Call) -> bool:
        """True for the request by which a chat finds out whether its adapter can be used."""
        return json.loads(call.inputs["sampling_parameters"][0]).get("max_new_tokens") == 1

    @property
    def checks(self) -> list[Call]:
        return [call for call in self.fake.calls if "control" not in call.inputs and self.is_check(call)]

    @property
    def chats(self) -> list[Call]:
        return [call for call in self.fake.calls if "control" not in call.inputs and not self.is_check(call)]


@pytest.fixture
def start() -> Iterator[Callable[..., Model]]:
    models: list[Model] = []

    def make(**info: Any) -> Model:
        models.append(Model(INFO | info))
        return models[-1]

    yield make
    for model in models:
        model.fake.stop()


def pipe(model: Model, text: str, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lorax_backend.cli", "chat", "--url", model.fake.url, *flags],
        input=text,
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
    )


def test_a_conversation_in_a_terminal(start: Callable[..., Model]) -> None:
    model = start()
    flags = [
        "chat",
        "--url",
        model.fake.url,
        "--adapter",
        "pirate",
        "--system",
        "Be brief.",
        "--temperature",
        "0.5",
    ]
    with Terminal(flags) as terminal:
        terminal.expect("tiny at ")
        terminal.expect("pirate> ")
        terminal.type("hello\n")
        terminal.expect("pirate saw 2")
        assert "tokens/s" in terminal.expect("ended by length]")
        terminal.expect("pirate> ")
        terminal.type("again\n")
        terminal.expect("pirate saw 4")
        terminal.expect("pirate> ")
        terminal.type("/adapter shout\n")
        terminal.expect("talking to shout")
        terminal.expect("shout> ")
        terminal.type("and you\n")
        terminal.expect("shout saw 6")
        terminal.expect("shout> ")
        terminal.type("/reset\n")
        terminal.expect("conversation forgotten")
        terminal.type("/system\n")
        terminal.expect("no system prompt")
        terminal.type("/adapter -\n")
        terminal.expect("talking to the base model")
        terminal.expect("base> ")
        terminal.type("two\\\nlines\n")
        terminal.expect("base saw 1")
        terminal.type("/adapters\n")
        terminal.expect("pirate   hub     on_device  8     2.0 KiB")
        terminal.type("/nonsense\n")
        terminal.expect("/nonsense is no command")
        terminal.type("/help\n")
        terminal.expect("/quit")
        terminal.type("/quit\n")
        assert terminal.wait() == 0
    first, second = model.chats[:2]
    assert model.messages(first)[0] == {"role": "system", "content": "Be brief."}
    assert model.messages(second)[1:3] == [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "pirate saw 2"},
    ]
    assert model.messages(model.chats[-1])[-1]["content"] == "two\nlines"
    assert "adapter_id" not in model.chats[-1].inputs
    assert json.loads(first.inputs["sampling_parameters"][0]) == {"max_new_tokens": 512, "temperature": 0.5}


def test_control_c_stops_the_answer_and_not_the_chat(start: Callable[..., Model]) -> None:
    model = start()
    with Terminal(["chat", "--url", model.fake.url]) as terminal:
        terminal.expect("base> ")
        terminal.type("slowly\n")
        terminal.expect("it be")
        terminal.type("\x03")
        terminal.expect("[base: stopped after")
        assert model.chats[0].over.wait(WAIT_S)
        assert model.chats[0].cancelled
        terminal.expect("base> ")
        # Python may see a Ctrl-C at its prompt only with the next key.
        terminal.type("half a line\x03\n")
        terminal.expect("/quit or Ctrl-D leaves")
        terminal.expect("base> ")
        terminal.type("go on\n")
        terminal.expect("base saw 3")
        terminal.expect("base> ")
        terminal.type("\x04")
        assert terminal.wait() == 0
    assert model.messages(model.chats[1])[1] == {"role": "assistant", "content": "it be"}


def test_an_error_is_shown_and_its_message_forgotten(start: Callable[..., Model]) -> None:
    model = start()
    with Terminal(["chat", "--url", model.fake.url]) as terminal:
        terminal.expect("base> ")
        terminal.type("fail\n")
        terminal.expect("error: the adapter is broken")
        terminal.expect("base> ")
        terminal.type("hello\n")
        terminal.expect("base saw 1")
        terminal.type("/quit\n")
        assert terminal.wait() == 0


def test_a_pipe_gets_the_answers_alone_on_standard_output(start: Callable[..., Model]) -> None:
    model = start()
    done = pipe(model, "hello\n\n/adapter pirate\nagain\n", "--max-new-tokens", "7", "--seed", "3")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "base saw 1\npirate saw 3\n"
    assert done.stderr.count("ended by length") == 2
    assert json.loads(model.chats[0].inputs["sampling_parameters"][0]) == {"max_new_tokens": 7, "seed": 3}


def test_a_pipe_whose_request_failed_ends_with_a_failure(start: Callable[..., Model]) -> None:
    done = pipe(start(), "fail\nhello")
    assert (done.returncode, done.stdout) == (1, "base saw 1\n")
    assert "the adapter is broken" in done.stderr


@pytest.mark.parametrize("interactive", [True, False])
def test_an_adapter_that_cannot_be_used_ends_the_chat_before_it_begins(
    interactive: bool, start: Callable[..., Model]
) -> None:
    model = start()
    flags = ["--adapter", "wrong", "--adapter-source", "hub", "--revision", "v2", "--api-token", "t"]
    if interactive:
        with Terminal(["chat", "--url", model.fake.url, *flags]) as terminal:
            terminal.expect("lorax-triton: --adapter wrong: hub:wrong does not exist")
            assert terminal.wait() == 1
            assert "wrong> " not in terminal.screen
    else:
        done = pipe(model, "hello\n", *flags)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == "lorax-triton: --adapter wrong: hub:wrong does not exist\n"
    assert model.chats == []
    (check,) = model.checks
    asked = [check.inputs[name] for name in ("adapter_id", "adapter_source", "api_token")]
    assert asked == [["wrong@v2"], ["hub"], ["t"]]


def test_a_chat_stays_with_its_adapter_if_another_cannot_be_used(start: Callable[..., Model]) -> None:
    model = start()
    with Terminal(["chat", "--url", model.fake.url, "--adapter", "pirate", "--revision", "v2"]) as terminal:
        terminal.expect("pirate> ")
        terminal.type("/adapter wrong\n")
        terminal.expect("error: /adapter wrong: hub:wrong does not exist\nstill talking to pirate\n")
        terminal.expect("pirate> ")
        terminal.type("/adapter slow\n")
        assert model.fake.wait_for_call(3).inputs["adapter_id"] == ["slow"]
        terminal.type("\x03")
        terminal.expect("still talking to pirate")
        assert model.fake.calls[3].over.wait(WAIT_S)
        terminal.expect("pirate> ")
        terminal.type("hello\n")
        terminal.expect("pirate@v2 saw 1")
        terminal.type("/adapter busy\n")
        terminal.expect("talking to busy")
        terminal.type("/quit\n")
        assert terminal.wait() == 0


def test_a_pipe_ends_at_an_adapter_that_cannot_be_used(start: Callable[..., Model]) -> None:
    model = start()
    done = pipe(model, "hello\n/adapter wrong\nagain\n")
    assert (done.returncode, done.stdout) == (1, "base saw 1\n")
    assert done.stderr.endswith("lorax-triton: /adapter wrong: hub:wrong does not exist\n")
    assert len(model.chats) == 1, "no other adapter answers for it"


def test_a_server_too_busy_to_try_the_adapter_is_no_reason_not_to_chat(start: Callable[..., Model]) -> None:
    model = start()
    done = pipe(model, "hello\n", "--adapter", "busy")
    assert (done.returncode, done.stdout) == (0, "busy saw 1\n"), done.stderr


def test_the_base_model_is_not_tried_first(start: Callable[..., Model]) -> None:
    model = start()
    assert pipe(model, "hello\n").returncode == 0
    assert model.checks == []


def test_a_model_without_a_chat_template_gets_each_line_as_it_is(start: Callable[..., Model]) -> None:
    model = start(has_chat_template=False)
    done = pipe(model, "one\ntwo\n")
    assert done.stdout == "base saw 1\nbase saw 1\n"
    assert "no chat template" in done.stderr
    assert model.chats[1].inputs["text_input"] == ["two"]


def test_a_server_that_is_not_there_is_one_line_and_a_failure() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lorax_backend.cli", "chat", "--url", "localhost:1"],
        input="x\n",
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("lorax-triton: No connection to localhost:1")
    assert len(done.stderr.splitlines()) == 1


def test_timings_tell_the_pace_after_the_first_token() -> None:
    details = StreamDetails(FinishReason.EndOfSequenceToken, prompt_tokens=5, generated_tokens=11)
    text = "5 + 11 tokens, first after 0.50 s, 10.0 tokens/s, 1.50 s in all, ended by eos_token"
    assert timings_text(details, 0.5, 1.5) == text
    assert timings_text(None, 0.5, 1.5) == "1.5 s"
