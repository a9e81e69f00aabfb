"""In which order a sender's thread delivers what requests hand over to it."""

from __future__ import annotations

import threading

import pytest

from lorax_backend.serving.delivery import LiveRequest, Sender
from lorax_backend.types import TokenOutput


class Line:
    """A sender whose first delivery waits until `go` is set, and what it has delivered: (handle, tokens)."""

    def __init__(self) -> None:
        self.go, self.began = threading.Event(), threading.Event()
        self.delivered: list[tuple[int, list[int | None]]] = []
        self.crashes: list[BaseException] = []
        self.sender = Sender("line", self._deliver, lambda name, error: self.crashes.append(error))
        self.sender.start()

    def live(self, handle: int) -> LiveRequest:
        made = LiveRequest(handle, str(handle), None, self.sender)  # type: ignore[arg-type]
        made.wake_on_token = True
        return made

    def _deliver(self, live: LiveRequest) -> None:
        self.began.set()
        assert self.go.wait(30)
        self.delivered.append((live.handle, [output.token_id for output in live.take()]))

    def finish(self) -> list[tuple[int, list[int | None]]]:
        self.go.set()
        self.sender.stop(30)
        assert not self.crashes
        return self.delivered


def push(live: LiveRequest, token: int) -> None:
    live.push(TokenOutput(live.handle, token, queue_s=0.0))


@pytest.fixture
def busy() -> tuple[Line, list[LiveRequest]]:
    """Requests that have had their first token, while the sender is at another."""
    line = Line()
    push(line.live(99), 0)
    assert line.began.wait(30)
    old = [line.live(handle) for handle in range(3)]
    for live in old:
        live.first_token_at = 1.0
    return line, old


def test_a_first_token_goes_before_the_tokens_of_those_that_have_theirs(
    busy: tuple[Line, list[LiveRequest]],
) -> None:
    line, old = busy
    for live in old:
        push(live, 7)
    push(line.live(10), 1)
    push(line.live(11), 2)
    assert line.finish() == [(99, [0]), (10, [1]), (11, [2]), (0, [7]), (1, [7]), (2, [7])]


def test_tokens_of_one_request_stay_in_order_and_none_is_lost(busy: tuple[Line, list[LiveRequest]]) -> None:
    line, old = busy
    push(old[0], 1)
    new = line.live(10)
    for token in range(4):
        push(new, token)
        push(old[1], token)
    push(old[0], 2)
    assert line.finish() == [(99, [0]), (10, [0, 1, 2, 3]), (0, [1, 2]), (1, [0, 1, 2, 3])]


def test_a_sender_that_stops_sends_what_waits_of_both_kinds(busy: tuple[Line, list[LiveRequest]]) -> None:
    line, old = busy
    push(old[2], 5)
    stopping = threading.Thread(target=line.sender.stop, args=(30.0,))
    stopping.start()
    line.go.set()
    stopping.join(30)
    assert line.delivered == [(99, [0]), (2, [5])]
