"""The serving side of the engine: requests in, events out, and nothing left hanging.

Standard library and the serving package only. Threads: the caller of `submit` only registers the request; a small
pool checks and tokenizes it; the engine's thread hands over tokens; sender threads build and send events; one poller
asks for cancellations. Whatever fails, every live request gets a final event.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

from lorax_backend.config import ServerConfig
from lorax_backend.engine.protocols import EngineClient
from lorax_backend.errors import (
    CancelledError,
    EngineDeadError,
    GenerationError,
    LoraxError,
    OverloadedError,
    ShuttingDownError,
    ValidationError,
)
from lorax_backend.serving.answer import AnswerBuilder
from lorax_backend.serving.cancellation import CancellationPoller
from lorax_backend.serving.delivery import EventStream, LiveRequest, ResponseChannel, Sender
from lorax_backend.serving.metrics import MetricsRegistry
from lorax_backend.serving.parameters import RawRequest, parse_request
from lorax_backend.serving.prompt import Limits, prepare
from lorax_backend.serving.service_metrics import ServiceMetrics
from lorax_backend.serving.tokenizer import TokenizerPool
from lorax_backend.types import EngineStats, GenerateRequest, GenerationEvent, TokenOutput

logger = logging.getLogger(__name__)

_ENGINE_COMMANDS = ("stats", "adapters", "check")


class GenerationService:
    """Owner of all live requests. Implements `EngineEvents` for its engine.

    Every method may be called from any thread. Request ids need not be unique: `cancel` ends every live request of
    an id, so callers who cancel by id should make ids that are.
    """

    def __init__(self, engine: EngineClient, tokenizer: TokenizerPool, config: ServerConfig) -> None:
        self._engine = engine
        self.tokenizer = tokenizer
        self.config = config
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._live: dict[int, LiveRequest] = {}
        self._by_id: dict[str, list[int]] = {}
        self._handles = itertools.count(1)
        self._draining = False
        self._started = False
        self._stopped = False
        self._dead_reason: str | None = None
        self._stats = EngineStats()
        self._limits = Limits(0, 0)
        longest = config.max_total_tokens or 4096
        self._metrics = ServiceMetrics(longest, longest)
        self._senders = [
            Sender(f"lorax-sender-{i}", self._deliver, self._crashed)
            for i in range(max(1, config.sender_threads))
        ]
        self._poller = CancellationPoller(
            config.cancel_poll_interval_s, self._snapshot, self._cancel_gone, self._crashed
        )
        self._pool = ThreadPoolExecutor(max(1, config.validation_workers), "lorax-validate")

    # ---- life ----

    def start(self) -> None:
        """Start the engine and the threads; returns when requests can be served.

        Raises:
            RuntimeError: with a readable reason, if the model cannot be loaded. Everything is stopped again then.
        """
        for sender in self._senders:
            sender.start()
        self._poller.start()
        try:
            self._engine.start(self)
            info = self._engine.info
        except BaseException:
            self._stop_threads(1.0)
            raise
        self._limits = Limits.of(info)
        self._metrics = ServiceMetrics(info.max_input_length, info.max_total_tokens)
        self._started = True

    @property
    def ready(self) -> bool:
        """True while new requests are taken. Takes no lock that could be held for long."""
        return self._started and not self._draining and self._dead_reason is None and self._engine.alive

    @property
    def num_live(self) -> int:
        """Requests received whose final event has not been sent."""
        return len(self._live)

    @property
    def limits(self) -> Limits:
        return self._limits

    @property
    def stats(self) -> EngineStats:
        """The engine's last report, about a second old."""
        return self._stats

    @property
    def metrics(self) -> MetricsRegistry:
        """The registry to mirror or render; another one before `start` than after it."""
        return self._metrics.registry

    def drain(self, timeout: float) -> bool:
        """Refuse new requests and wait for the live ones; False if some are left after `timeout` seconds."""
        with self._idle:
            self._draining = True
            return self._idle.wait_for(lambda: not self._live, timeout)

    def stop(self, timeout: float = 5.0) -> None:
        """End what is left with an error, then stop the threads and the engine. May be called twice."""
        with self._lock:
            self._draining = True
            if self._stopped:
                return
            self._stopped = True
        self._fail_all(ShuttingDownError("the server has stopped; send the request to another one or later"))
        with self._idle:
            self._idle.wait_for(lambda: not self._live, timeout)
        self._stop_threads(timeout)
        if self._started:
            self._engine.stop(timeout)

    # ---- requests ----

    def submit(self, raw: RawRequest, channel: ResponseChannel) -> None:
        """Take a request as it arrived; returns at once. All outcomes, refusals included, go to `channel`."""
        live = self._admit(raw.request_id, channel)
        if live is not None:
            self._validate_later(live, lambda: parse_request(raw, self.config))

    def submit_request(self, request: GenerateRequest, channel: ResponseChannel) -> None:
        """Take a request that is already parsed; like `submit`."""
        live = self._admit(request.request_id, channel)
        if live is not None:
            self._validate_later(live, lambda: request)

    def generate(self, request: GenerateRequest) -> EventStream:
        """Start a request and return the iterator of its events; closing it cancels. For use as a library.

        The iterator raises a `LoraxError` if the request is refused or fails.
        """
        stream = EventStream(on_close=self._poller.poke)
        self.submit_request(request, stream.channel)
        return stream

    def request(self, prompt: str, **parameters: Any) -> GenerateRequest:
        """A request for `generate` from a prompt and parameters by the names of `serving.schema`.

        Raises:
            ValidationError: naming the fields at fault.
        """
        return parse_request(RawRequest("", {"text_input": prompt, **parameters}), self.config)

    def cancel(self, request_id: str) -> bool:
        """End every live request of this id with a `CancelledError`; False if there is none."""
        with self._lock:
            lives = [self._live[handle] for handle in self._by_id.get(request_id, ()) if handle in self._live]
        for live in lives:
            self._end(live, CancelledError("cancelled by a control request"))
        return bool(lives)

    def control(self, command: str, arguments: dict[str, Any] | None = None) -> dict[str, Any]:
        """Run a command: cancel (request_id), info, metrics, or the engine's stats, adapters, check.

        Raises:
            ValidationError: unknown command or bad arguments.
            EngineDeadError: the engine does not answer.
        """
        arguments = arguments or {}
        if command == "cancel":
            request_id = arguments.get("request_id")
            if not isinstance(request_id, str) or not request_id:
                raise ValidationError("control.request_id: expected the id of the request to cancel, a text")
            return {"cancelled": self.cancel(request_id)}
        if command == "info":
            return self.info()
        if command == "metrics":
            return {"prometheus": self.metrics.render()}
        if command in _ENGINE_COMMANDS:
            return self._engine.control(command, arguments)
        known = ", ".join(("cancel", "info", "metrics", *_ENGINE_COMMANDS))
        raise ValidationError(f"control.command: {command!r} is not one of {known}")

    def info(self) -> dict[str, Any]:
        """Facts about the model and the limits of requests."""
        config = self.config
        return {
            **asdict(self._engine.info),
            "max_concurrent_requests": config.max_concurrent_requests,
            "max_stop_sequences": config.max_stop_sequences,
            "max_best_of": 1,
            "max_active_adapters": config.max_active_adapters,
            "max_prompt_bytes": config.max_prompt_bytes,
            "validation_workers": config.validation_workers,
            "default_adapter_source": config.default_adapter_source,
            "has_chat_template": self.tokenizer.has_chat_template,
            "vocab_size": self.tokenizer.vocab_size,
            "eos_token_ids": list(self.tokenizer.eos_token_ids),
            "ready": self.ready,
            "live_requests": self.num_live,
        }

    # ---- events of the engine ----

    def on_outputs(self, outputs: list[TokenOutput]) -> None:
        live_requests = self._live
        for output in outputs:
            live = live_requests.get(output.handle)
            if live is not None:
                live.push(output)

    def on_stats(self, stats: EngineStats) -> None:
        self._stats = stats
        self._metrics.engine(stats)

    def on_dead(self, reason: str) -> None:
        if self._dead_reason is None:
            self._dead_reason = reason
            logger.error("the engine is gone: %s", reason)
        self._fail_all(self._dead_error())

    # ---- inside ----

    def _dead_error(self) -> EngineDeadError:
        return EngineDeadError(f"the engine has stopped: {self._dead_reason}; the server must be restarted")

    def _admit(self, request_id: str, channel: ResponseChannel) -> LiveRequest | None:
        """Register a request; None if it was refused, which its channel is then told."""
        handle = next(self._handles)
        live = LiveRequest(handle, request_id, channel, self._senders[handle % len(self._senders)])
        with self._lock:
            refusal = self._refusal()
            self._live[handle] = live
            if request_id:
                self._by_id.setdefault(request_id, []).append(handle)
        self._metrics.in_flight(len(self._live))
        self._poller.poke_if_idle()
        if refusal is not None:
            live.fail(refusal)
            return None
        return live

    def _refusal(self) -> LoraxError | None:
        if self._dead_reason is not None:
            return self._dead_error()
        if self._draining or not self._started:
            return ShuttingDownError("the server takes no new requests; send it to another one or later")
        limit = self.config.max_concurrent_requests
        if len(self._live) >= limit:
            return OverloadedError(
                f"{limit} requests are in flight, the most this server takes (max_concurrent_requests); try again later"
            )
        return None

    def _validate_later(self, live: LiveRequest, parse: Callable[[], GenerateRequest]) -> None:
        try:
            self._pool.submit(self._validate, live, parse)
        except RuntimeError:  # the pool is shut down
            live.fail(ShuttingDownError("the server is stopping"))

    def _validate(self, live: LiveRequest, parse: Callable[[], GenerateRequest]) -> None:
        """Check, tokenize and hand to the engine (validation pool)."""
        if live.failing():
            return
        try:
            request = parse()
            live.request = request
            self._metrics.received(request.stream)
            engine_request, prompt = prepare(request, live.handle, self.tokenizer, self._limits)
            live.builder = AnswerBuilder(request, self.tokenizer, prompt)
            live.wake_on_token = request.stream or bool(request.stop)
            live.max_new_tokens = engine_request.sampling.max_new_tokens
            live.validated_at = time.monotonic()
            self._metrics.validated(
                live.validated_at - live.received_at, len(prompt.ids), live.max_new_tokens
            )
            self._engine.submit(engine_request)
        except LoraxError as error:
            live.fail(error)
        except Exception as error:
            logger.exception("request %s failed before it reached the engine", live.request_id)
            live.fail(GenerationError(f"internal error: {type(error).__name__}: {error}"))
        else:
            if (
                live.error is not None
            ):  # ended meanwhile: its cancel may have reached the engine before the submit
                self._cancel_in_engine(live)

    def _deliver(self, live: LiveRequest) -> None:
        """Send what has become of one request (its sender's thread)."""
        outputs = live.take()
        if live.ended:
            return
        try:
            event = self._next_event(live, outputs)
            if event is None:
                return
            if event.final:
                event.timings = live.timings(time.monotonic())
            live.channel.send(event, live.request)
        except Exception as error:
            self._give_up(live, error)
            return
        if event.final:
            self._finish(live, event)

    def _next_event(self, live: LiveRequest, outputs: list[TokenOutput]) -> GenerationEvent | None:
        builder = live.builder
        if live.error is None and builder is not None and outputs:
            event = builder.add(outputs)
            if builder.stopped:
                self._cancel_in_engine(live)
            return event
        if live.error is None:
            return None
        return GenerationEvent(
            error=live.error,
            prompt_tokens=builder.prompt_tokens if builder else 0,
            generated_tokens=builder.generated_tokens if builder else 0,
        )

    def _give_up(self, live: LiveRequest, error: Exception) -> None:
        """The event could not be built or sent: end this request alone, telling the caller if that is possible."""
        logger.warning("request %s: cannot deliver: %s: %s", live.request_id, type(error).__name__, error)
        self._cancel_in_engine(live)
        failure = GenerationError(
            f"the answer could not be delivered: {type(error).__name__}: {error}"
        ).to_dict()
        event = GenerationEvent(error=failure, timings=live.timings(time.monotonic()))
        try:
            live.channel.send(event, live.request)
        except Exception:
            logger.debug("request %s: its channel is broken", live.request_id)
        self._finish(live, event)

    def _finish(self, live: LiveRequest, event: GenerationEvent) -> None:
        """Forget a request whose final event is out."""
        live.ended = True
        with self._idle:
            self._live.pop(live.handle, None)
            handles = self._by_id.get(live.request_id)
            if handles is not None and live.handle in handles:
                handles.remove(live.handle)
                if not handles:
                    del self._by_id[live.request_id]
            if not self._live:
                self._idle.notify_all()
        self._metrics.in_flight(len(self._live))
        if event.error is not None:
            self._metrics.failed(str(event.error.get("error_type")))
        else:
            self._metrics.succeeded(event.timings or {}, event.generated_tokens)

    def _end(self, live: LiveRequest, error: LoraxError) -> None:
        """End a request with an error and free what the engine holds for it."""
        live.fail(error)
        self._cancel_in_engine(live)

    def _cancel_in_engine(self, live: LiveRequest) -> None:
        if self._dead_reason is not None:
            return
        try:
            self._engine.cancel(live.handle)
        except LoraxError as error:  # the engine has just gone; `on_dead` follows
            logger.debug("request %s: not cancelled: %s", live.request_id, error.message)

    def _snapshot(self) -> list[LiveRequest]:
        with self._lock:
            return list(self._live.values())

    def _cancel_gone(self, live: LiveRequest) -> None:
        self._end(live, CancelledError("the client has cancelled the request or gone away"))

    def _fail_all(self, error: LoraxError) -> None:
        for live in self._snapshot():
            live.fail(error)

    def _crashed(self, thread: str, error: BaseException) -> None:
        """A service thread met an error it does not expect: nothing can be trusted, so everyone is told."""
        logger.critical("thread %s failed", thread, exc_info=error)
        self.on_dead(f"thread {thread} failed: {type(error).__name__}: {error}")

    def _stop_threads(self, timeout: float) -> None:
        self._poller.stop(timeout)
        self._pool.shutdown(wait=False, cancel_futures=True)
        for sender in self._senders:
            sender.stop(timeout)
