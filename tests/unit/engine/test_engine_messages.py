"""Messages between the engine's processes arrive whole and in order, however the pipe cuts them."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import suppress

import pytest

from lorax_backend.engine.messages import MessageReader, MessageWriter, pack_request, unpack_request
from lorax_backend.types import AdapterRef, EngineRequest, SamplingParams

_TIMEOUT_S = 30.0


@pytest.fixture
def pipe() -> Iterator[tuple[MessageWriter, MessageReader, int]]:
    """Both ends, and the descriptor that is written to."""
    reading, writing = os.pipe()
    writer, reader = MessageWriter(writing), MessageReader(reading)
    yield writer, reader, writing
    writer.close()
    with suppress(OSError):
        reader.close()


Pipe = tuple[MessageWriter, MessageReader, int]


def test_a_reader_takes_all_that_is_there_and_waits_for_nothing(pipe: Pipe) -> None:
    writer, reader, _ = pipe
    assert reader.take() == []
    for number in range(3):
        writer.send(("cancel", number))
    assert reader.take() == [("cancel", 0), ("cancel", 1), ("cancel", 2)]
    assert reader.take() == []


def test_a_message_that_comes_in_pieces_is_taken_when_its_last_piece_is_there(pipe: Pipe) -> None:
    writer, reader, writing = pipe
    whole = bytearray()

    class Kept(MessageWriter):
        def _write(self, data: bytes) -> None:
            whole.extend(data)

    Kept(writing).send({"prompt": list(range(100))})
    for position in range(len(whole) - 1):
        os.write(writing, whole[position : position + 1])
        assert reader.take() == []
    os.write(writing, whole[-1:])
    writer.send("next")
    assert reader.take() == [{"prompt": list(range(100))}, "next"]


def test_a_message_larger_than_the_pipe_arrives(pipe: Pipe) -> None:
    writer, reader, _ = pipe
    large = os.urandom(3 << 20)
    sender = threading.Thread(target=writer.send, args=(large,))
    sender.start()
    assert reader.receive() == large
    sender.join(_TIMEOUT_S)
    assert not sender.is_alive()


def test_what_was_sent_before_the_end_is_taken_before_it(pipe: Pipe) -> None:
    writer, reader, _ = pipe
    writer.send("last words")
    writer.close()
    assert reader.take() == ["last words"]
    with pytest.raises(EOFError):
        reader.take()
    with pytest.raises(EOFError):
        reader.receive()


def test_half_a_message_at_the_end_is_no_message(pipe: Pipe) -> None:
    writer, reader, writing = pipe
    os.write(writing, b"\x05\0\0")
    writer.close()
    with pytest.raises(EOFError):
        reader.receive()


def test_nobody_reads_what_is_sent_to_a_closed_pipe(pipe: Pipe) -> None:
    writer, reader, _ = pipe
    reader.close()
    with pytest.raises(BrokenPipeError):
        writer.send("anybody?")
    writer.close()
    with pytest.raises(BrokenPipeError):
        writer.send("anybody?")


def test_a_message_that_need_not_arrive_is_left_out_when_the_pipe_is_full(pipe: Pipe) -> None:
    writer, reader, writing = pipe
    writer.send_unless_full("stop", 1.0)
    assert reader.take() == ["stop"]
    os.set_blocking(writing, False)
    with suppress(BlockingIOError):
        while True:
            os.write(writing, bytes(4096))
    os.set_blocking(writing, True)
    writer.send_unless_full("stop", 1.0)  # returns, although nobody reads


def test_messages_of_many_threads_do_not_mix(pipe: Pipe) -> None:
    writer, reader, _ = pipe
    threads = [
        threading.Thread(target=lambda n=n: [writer.send((n, i, "x" * 5000)) for i in range(50)])
        for n in range(4)
    ]
    for thread in threads:
        thread.start()
    received = [reader.receive() for _ in range(200)]
    for thread in threads:
        thread.join(_TIMEOUT_S)
    for n in range(4):
        assert [message[1] for message in received if message[0] == n] == list(range(50))


@pytest.mark.parametrize(
    "request_",
    [
        EngineRequest(1, [5, 6], SamplingParams(7)),
        EngineRequest(
            handle=2,
            prompt_ids=[9],
            sampling=SamplingParams(
                3, 1, True, 0.5, 7, 0.9, 11, 1.1, 0.2, 0.3, 4, (1, 2), 0.8, True, ((1, -1.0),), True
            ),
            adapter=AdapterRef("hub", "org/otter", "main", 3),
            api_token="secret",
            priority=-1,
            queue_timeout_s=2.5,
        ),
    ],
)
def test_a_packed_request_is_plain_data_and_comes_back_as_it_was(request_: EngineRequest) -> None:
    packed = pack_request(request_)
    assert unpack_request(packed) == request_
    assert {type(part) for part in packed} <= {int, float, str, list, tuple, type(None)}
