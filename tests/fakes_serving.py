"""An engine and channels without a model, for tests of the serving side. Tests wait on events, never on time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from lorax_backend.engine.protocols import EngineEvents
from lorax_backend.errors import EngineDeadError, ValidationError
from lorax_backend.types import (
    EngineInfo,
    EngineRequest,
    EngineStats,
    FinishReason,
    GenerateRequest,
    GenerationEvent,
    TokenOutput,
)

WAIT_S = 20.0


def engine_info(**changes: Any) -> EngineInfo:
    values: dict[str, Any] = {
        "model_id": "fake", "model_type": "llama", "dtype": "float32", "device": "cpu",
        "attention_backend": "torch", "lora_backend": "torch", "num_blocks": 64, "block_size": 16,
        "adapter_pages": 8, "adapter_page_rank": 8, "max_lora_rank": 64, "max_input_length": 255,
        "max_total_tokens": 256, "max_num_seqs": 64, "max_batch_tokens": 512, "load_seconds": 0.0,
    }  # fmt: skip
    return EngineInfo(**(values | changes))


class FakeEngine:
    """Answers each request with the ids that `reply` gives, one token of every running request a step.

    With `reply=None` nothing is generated until the test calls `emit`.
    """

    def __init__(self, reply: Callable[[EngineRequest], Sequence[int]] | None = None, **info: Any) -> None:
        self.info = engine_info(**info)
        self.alive = False
        self.submitted: list[EngineRequest] = []
        self.cancelled: list[int] = []
        self.running: dict[int, tuple[EngineRequest, list[int]]] = {}
        self._reply = reply
        self._events: EngineEvents | None = None
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="fake-engine", daemon=True)

    # ---- the EngineClient protocol ----

    def start(self, events: EngineEvents) -> None:
        self._events = events
        self.alive = True
        if self._reply is not None:
            self._thread.start()

    def submit(self, request: EngineRequest) -> None:
        with self._changed:
            if not self.alive:
                raise EngineDeadError("the fake engine is dead")
            self.submitted.append(request)
            self.running[request.handle] = (request, [])
            self._changed.notify_all()

    def cancel(self, handle: int) -> None:
        with self._changed:
            self.cancelled.append(handle)
            self.running.pop(handle, None)
            self._changed.notify_all()

    def control(self, command: str, arguments: dict[str, Any], timeout: float = 10.0) -> dict[str, Any]:
        if command == "check":
            raise ValidationError("check: no")
        return {"command": command, **arguments}

    def stop(self, timeout: float = 5.0) -> None:
        with self._changed:
            self._stopping = True
            self.alive = False
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(timeout)

    # ---- for tests ----

    def emit(
        self, handle: int, ids: Sequence[int], finish: FinishReason | None = None, **fields: Any
    ) -> None:
        """Report tokens of one request; the last carries `finish`."""
        assert self._events is not None
        outputs = [TokenOutput(handle, token_id, **fields) for token_id in ids]
        if finish is not None:
            outputs[-1] = outputs[-1]._replace(finish_reason=finish)
        self._events.on_outputs(outputs)

    def fail(self, handle: int, error: dict[str, Any]) -> None:
        assert self._events is not None
        self._events.on_outputs([TokenOutput(handle, None, error=error)])

    def report(self, stats: EngineStats) -> None:
        assert self._events is not None
        self._events.on_stats(stats)

    def die(self, reason: str) -> None:
        assert self._events is not None
        self.alive = False
        self._events.on_dead(reason)

    def wait_submitted(self, count: int) -> list[EngineRequest]:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.submitted) >= count, WAIT_S)
            return list(self.submitted)

    def wait_cancelled(self, handle: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: handle in self.cancelled, WAIT_S)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self.running or self._stopping)
                if self._stopping:
                    return
                outputs = [self._next(request, given) for request, given in list(self.running.values())]
                for output in outputs:
                    if output.finish_reason is not None:
                        del self.running[output.handle]
            assert self._events is not None
            self._events.on_outputs(outputs)

    def _next(self, request: EngineRequest, given: list[int]) -> TokenOutput:
        assert self._reply is not None
        token_id = self._reply(request)[len(given)]
        given.append(token_id)
        reason = None
        if len(given) == request.sampling.max_new_tokens:
            reason = FinishReason.LENGTH
        elif token_id in request.sampling.stop_token_ids:
            reason = FinishReason.EOS
        first = len(given) == 1
        return TokenOutput(
            request.handle,
            token_id,
            logprob=-0.5 if request.sampling.top_logprobs is not None else None,
            finish_reason=reason,
            cached_tokens=0 if first else None,
            queue_s=0.001 if first else None,
        )


class RecordingChannel:
    """Keeps every event. `gate` blocks the next sends until it is set; `fail` makes the next send raise."""

    def __init__(self) -> None:
        self.events: list[GenerationEvent] = []
        self.request: GenerateRequest | None = None
        self.cancelled = False
        self.fail: Exception | None = None
        self.gate = threading.Event()
        self.gate.set()
        self._changed = threading.Condition()
        self.entered = threading.Event()

    def send(self, event: GenerationEvent, request: GenerateRequest | None) -> None:
        self.entered.set()
        assert self.gate.wait(WAIT_S)
        if self.fail is not None:
            raise self.fail
        with self._changed:
            self.request = request
            self.events.append(event)
            self._changed.notify_all()

    def is_cancelled(self) -> bool:
        return self.cancelled

    def wait_events(self, count: int) -> list[GenerationEvent]:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.events) >= count, WAIT_S), self.events
            return list(self.events)

    def wait_final(self) -> GenerationEvent:
        """The last event; fails unless it is the only final one."""
        with self._changed:
            done = self._changed.wait_for(lambda: bool(self.events) and self.events[-1].final, WAIT_S)
            assert done, self.events
        assert sum(event.final for event in self.events) == 1
        return self.events[-1]

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events)

    @property
    def error(self) -> dict[str, Any]:
        error = self.wait_final().error
        assert error is not None
        return error
