"""Connections that take their time: each is ended by itself, and requests of others go on."""

from __future__ import annotations

import contextlib
import json
import socket

import pytest
from fakes_gateway import FakeTriton, StartGateway
from gateway_calls import TIMEOUT_S, GatewayCaller

HEALTH = b"GET /health HTTP/1.1\r\nhost: a\r\n\r\n"


def read_to_end(connection: socket.socket) -> bytes:
    """What comes until the gateway closes; fails after the socket's time limit, which is generous."""
    parts = []
    while part := connection.recv(65536):
        parts.append(part)
    return b"".join(parts)


def read_answer(connection: socket.socket) -> bytes:
    """One answer with a body, of a connection that stays open."""
    text = b""
    while b"\r\n\r\n" not in text:
        text += connection.recv(65536)
    head, _, body = text.partition(b"\r\n\r\n")
    length = next(
        int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")
    )
    while len(body) < length:
        body += connection.recv(65536)
    return head + b"\r\n\r\n" + body


def drip(connection: socket.socket, piece: bytes, most: int) -> bytes:
    """Send `piece` again and again, `most` times at most, until the gateway closes the connection; what it said, or
    nothing if that was lost because a piece was on its way to a connection that was closed."""
    connection.settimeout(0.02)
    for _ in range(most):
        try:
            answer = connection.recv(65536)
        except TimeoutError:
            with contextlib.suppress(ConnectionError):
                connection.sendall(piece)
            continue
        except ConnectionError:
            return b""
        connection.settimeout(TIMEOUT_S)
        with contextlib.suppress(ConnectionError):
            return answer + read_to_end(connection)
        return answer
    raise AssertionError("the gateway went on reading")


def error_of(answer: bytes) -> tuple[int, str]:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"content-type: application/json" in head
    return int(head.split()[1]), json.loads(body)["error_type"]


@pytest.fixture
def gateway(start: StartGateway) -> GatewayCaller:
    return start(FakeTriton(), header_timeout=1.5)


def test_headers_that_do_not_end_are_refused_in_time_while_others_are_served(gateway: GatewayCaller) -> None:
    slow = [gateway.raw(b"POST /generate HTTP/1.1\r\nhost: a\r\nx-slow: ") for _ in range(50)]
    assert gateway.get("/health").status == 200
    for connection in slow:
        assert error_of(read_to_end(connection)) == (408, "request_timeout")
        connection.close()


def test_a_byte_now_and_then_does_not_buy_time(gateway: GatewayCaller) -> None:
    with gateway.raw(b"GET /health HTTP/1.1\r\n") as connection:
        answer = drip(connection, b"x: y\r\n", most=3000)
    assert answer == b"" or error_of(answer) == (408, "request_timeout")


@pytest.mark.parametrize("first", [b"", b"\r\n\r\n"])
def test_a_connection_that_never_asks_anything_is_closed_without_a_word(
    gateway: GatewayCaller, first: bytes
) -> None:
    with gateway.raw(first) as connection:
        assert read_to_end(connection) == b""


def test_a_second_request_on_a_connection_has_the_same_time_as_the_first(gateway: GatewayCaller) -> None:
    with gateway.raw(HEALTH) as connection:
        assert read_answer(connection).startswith(b"HTTP/1.1 200")
        connection.sendall(HEALTH)
        assert read_answer(connection).startswith(b"HTTP/1.1 200"), "between requests it may be silent"
        connection.sendall(HEALTH[:10])
        assert error_of(read_to_end(connection)) == (408, "request_timeout")


def test_a_request_that_takes_longer_than_headers_may_is_not_touched(start: StartGateway) -> None:
    gateway = start(FakeTriton(), header_timeout=1.5, body_timeout=600.0)
    body = json.dumps({"inputs": "hello"}).encode()
    head = (
        b"POST /generate HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    )
    with gateway.raw(head % len(body)) as connection:
        with gateway.raw(b"") as other:
            assert read_to_end(other) == b"", "so long the header's time is over"
        connection.sendall(body)
        assert read_answer(connection).startswith(b"HTTP/1.1 200")


def test_headers_without_end_are_refused_by_their_length(start: StartGateway) -> None:
    gateway = start(FakeTriton(), header_timeout=600.0)
    with gateway.raw(b"GET /health HTTP/1.1\r\nx-long: ") as connection:
        answer = drip(connection, b"x" * 8192, most=100)
    assert answer == b"" or error_of(answer) == (431, "headers_too_large")
    assert gateway.get("/health", {"x-long": "x" * 30_000}).status == 200


def test_what_is_no_http_gets_an_error_of_the_usual_form(gateway: GatewayCaller) -> None:
    with gateway.raw(b"\x16\x03\x01 hello\r\n\r\n") as connection:
        assert error_of(read_to_end(connection)) == (400, "invalid_http")


def test_beyond_the_number_of_idle_connections_the_oldest_goes_and_requests_stay(start: StartGateway) -> None:
    gateway = start(FakeTriton(), header_timeout=600.0, max_idle_connections=4, body_timeout=600.0)
    body = json.dumps({"inputs": "hello"}).encode()
    head = (
        b"POST /generate HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    )
    busy = gateway.raw(head.replace(b"host", b"expect: 100-continue\r\nhost") % len(body))
    assert busy.recv(65536).startswith(b"HTTP/1.1 100"), "it is a request now"
    idle = [gateway.raw(b"") for _ in range(10)]
    for connection in idle[:6]:
        assert read_to_end(connection) == b""
    busy.sendall(body)
    assert read_answer(busy).startswith(b"HTTP/1.1 200")
    assert read_to_end(idle[6]) == b"", "now the busy one is idle, and the youngest"
    assert gateway.get("/health").status == 200
    for connection in (busy, *idle):
        connection.close()
