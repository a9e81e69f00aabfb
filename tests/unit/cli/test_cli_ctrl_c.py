"""Ctrl-C during an answer, wherever the main thread is at that moment."""

from __future__ import annotations

import io
import json
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from fake_triton_server import WAIT_S, Call, FakeTriton, answer, response, token

from lorax_backend.cli.chat import Chat
from lorax_backend.cli.ctrl_c import CtrlC
from lorax_triton import Client


@pytest.fixture(autouse=True)
def ctrl_c_raises() -> Iterator[None]:
    """As in a terminal's programs; tests may run as a shell's background job, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def server() -> Iterator[FakeTriton]:
    fake = FakeTriton(script)
    yield fake
    fake.stop()


def script(call: Call) -> Iterator[Any]:
    """Says no more after 'slowly'."""
    if json.loads(call.inputs["messages"][0])[-1]["content"] == "slowly":
        yield response(text_output=["it be"], tokens=[token(1, "it be")])
        call.over.wait(WAIT_S)
    else:
        yield from answer("well")


@pytest.mark.parametrize("moment", [1, 2, 3])
def test_an_answer_is_stopped_and_the_next_one_comes(
    moment: int, server: FakeTriton, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At these moments after a token, gRPC or the client has just taken a lock for the next one."""
    left = 0
    enter = threading.Condition.__enter__

    class Screen(io.StringIO):
        def write(self, text: str) -> int:
            nonlocal left
            left = moment if text == "it be" else left
            return super().write(text)

    def enter_and_press(condition: threading.Condition) -> bool:
        nonlocal left
        taken = enter(condition)
        if left and threading.current_thread() is threading.main_thread():
            left -= 1
            if not left:
                signal.raise_signal(signal.SIGINT)
        return taken

    monkeypatch.setattr(threading.Condition, "__enter__", enter_and_press)
    with Client(server.url, timeout=WAIT_S) as client:
        chat = Chat(client, {}, out=Screen(), notes=io.StringIO(), interactive=True)
        chat._answer("slowly")
        assert server.calls[0].over.wait(WAIT_S)
        assert server.calls[0].cancelled
        chat._answer("again")
    assert chat.out.getvalue() == "it be\nwell\n"  # type: ignore[attr-defined]
    assert "[base: stopped after" in chat.notes.getvalue()  # type: ignore[attr-defined]


def test_ctrl_c_ends_a_request_that_has_yet_to_be_sent_and_raises_when_pressed_again() -> None:
    cancelled = threading.Event()
    with CtrlC() as ctrl_c:
        signal.raise_signal(signal.SIGINT)
        assert ctrl_c.pressed
        assert not cancelled.is_set()
        ctrl_c.calls(cancelled.set)
        assert cancelled.is_set()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_ctrl_c_stays_ignored_where_it_is() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with CtrlC() as ctrl_c:
        signal.raise_signal(signal.SIGINT)
    assert not ctrl_c.pressed
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
