"""The serving side of the engine: requests in, events out, and nothing left hanging.

Standard library and the serving package only. Threads: the caller of `submit` registers the request, and checks and
tokenizes it if it is short and comes alone, otherwise a small pool does that; the engine's thread hands over tokens;
sender threads build and send events; one poller asks for cancellations. Whatever fails, every live request gets a final
event.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Mapping
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
)
from lorax_backend.serving.adapter_fields import adapter_ref
from lorax_backend.serving.adapter_templates import AdapterTemplates, FileSource
from lorax_backend.serving.admission import Admission
from lorax_backend.serving.alias_store import AliasStore
from lorax_backend.serving.aliases import AliasTable
from lorax_backend.serving.cancellation import CancellationPoller
from lorax_backend.serving.control import preload_adapters, run_command
from lorax_backend.serving.delivery import EventStream, LiveRequest, ResponseChannel, Sender
from lorax_backend.serving.given import RawRequest
from lorax_backend.serving.intake import Intake, is_short
from lorax_backend.serving.live_requests import LiveRequests
from lorax_backend.serving.metrics import MetricsRegistry
from lorax_backend.serving.parameters import parse_request
from lorax_backend.serving.prompt import Limits
from lorax_backend.serving.service_metrics import ServiceMetrics
from lorax_backend.serving.tokenizer import TokenizerPool
from lorax_backend.types import EngineStats, GenerateRequest, GenerationEvent, TokenOutput

logger = logging.getLogger(__name__)


class GenerationService:
    """Owner of all live requests. Implements `EngineEvents` for its engine.

    Every method may be called from any thread. Request ids need not be unique: `cancel` ends every live request of
    an id, so callers who cancel by id should make ids that are.
    """

    def __init__(
        self,
        engine: EngineClient,
        tokenizer: TokenizerPool,
        config: ServerConfig,
        adapter_sources: Callable[[], Mapping[str, FileSource]] = dict,
    ) -> None:
        """`adapter_sources` makes the sources in which adapters' own chat templates are looked for.

        Raises:
            ValidationError: an option that names adapters cannot be read.
        """
        self.engine = engine
        self.tokenizer = tokenizer
        self.config = config
        self.aliases = AliasTable(
            lambda name, source, revision: adapter_ref(name, source, revision, config), AliasStore.of(config)
        )
        self.aliases.load(config.adapter_aliases)
        self.admission = Admission(config.max_concurrent_requests, config.max_requests_per_adapter)
        self._live = LiveRequests()
        self._handles = itertools.count(1)
        self._started = False
        self._draining = False
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
            config.cancel_poll_interval_s, self._live.snapshot, self._cancel_gone, self._crashed
        )
        self._intake = Intake(self, adapter_sources)

    # ---- life ----

    def start(self) -> None:
        """Start the engine and the threads; returns when requests can be served.

        Raises:
            RuntimeError: with a readable reason, if the model cannot be loaded or an adapter of the options cannot be
                preloaded. Everything is stopped again then.
        """
        try:
            self.engine.start(self)
            info = self.engine.info
        except BaseException:
            self.stop(1.0)
            raise
        self._limits = Limits.of(info)
        self._metrics = ServiceMetrics(
            info.max_input_length, info.max_total_tokens, self.config.default_adapter_source
        )
        self._metrics.adapters.config(info)
        for sender in self._senders:
            sender.start()
        self._poller.start()
        self._started = True
        try:
            preload_adapters(self)
        except BaseException:
            self.stop(1.0)
            raise

    @property
    def ready(self) -> bool:
        """True while new requests are taken. Takes no lock."""
        return self._started and not self._draining and self._dead_reason is None and self.engine.alive

    @property
    def num_live(self) -> int:
        """Requests received whose final event has not been sent."""
        return len(self._live)

    @property
    def live(self) -> LiveRequests:
        """The table of live requests."""
        return self._live

    @property
    def adapter_templates(self) -> AdapterTemplates:
        """The chat templates that adapters brought along."""
        return self._intake.adapter_templates

    @property
    def service_metrics(self) -> ServiceMetrics:
        """What to tell of a request's life; another object before `start` than after it."""
        return self._metrics

    @property
    def limits(self) -> Limits:
        """Longest prompt and longest sum of prompt and answer."""
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
        self._draining = True
        return self._live.wait_empty(timeout)

    def stop(self, timeout: float = 5.0) -> None:
        """End what is left with an error, then stop the threads and the engine. May be called twice."""
        self._draining = True
        if self._stopped:
            return
        self._stopped = True
        self._live.close()
        self._fail_all(ShuttingDownError("the server has stopped; send the request to another one or later"))
        deadline = time.monotonic() + timeout
        self._live.wait_empty(timeout)
        self._intake.stop()
        threads: list[CancellationPoller | Sender] = [self._poller, *self._senders]
        for thread in threads:
            thread.stop(max(0.1, deadline - time.monotonic()))
        if self._started:
            self.engine.stop(timeout)

    # ---- requests ----

    def submit(self, raw: RawRequest, channel: ResponseChannel) -> None:
        """Take a request as it arrived; returns within a millisecond or so. All outcomes, refusals included, go to
        `channel`."""
        self._take(raw.request_id, channel, lambda: parse_request(raw, self.config), is_short(raw))

    def submit_request(self, request: GenerateRequest, channel: ResponseChannel) -> None:
        """Take a request that is already parsed; like `submit`."""
        self._take(request.request_id, channel, lambda: request)

    def generate(self, request: GenerateRequest) -> EventStream:
        """Start a request and return the iterator of its events; closing it cancels. For use as a library.

        The iterator raises a `LoraxError` if the request is refused or fails.
        """
        stream = EventStream(on_close=self._poller.poke)
        self.submit_request(request, stream.channel)
        return stream

    def request(self, prompt: str | None = None, **parameters: Any) -> GenerateRequest:
        """A request for `generate` from a prompt, or `messages` or `input_ids`, and parameters by the names of
        `serving.schema`.

        Raises:
            ValidationError: naming the fields at fault.
        """
        return parse_request(RawRequest("", {"text_input": prompt, **parameters}), self.config)

    def cancel(self, request_id: str) -> bool:
        """End every live request of this id with a `CancelledError`; False if there is none."""
        lives = self._live.of_request_id(request_id)
        for live in lives:
            self.end(live, CancelledError("cancelled by a control request"))
        return bool(lives)

    def control(self, command: str, arguments: dict[str, Any] | None = None) -> dict[str, Any]:
        """Run a command; see `serving.control`.

        Raises:
            ValidationError: unknown command or bad arguments.
            UnauthorizedError: the command changes something, and `admin_key` is missing or wrong.
            EngineDeadError: the engine does not answer.
        """
        return run_command(self, command, arguments or {})

    # ---- events of the engine ----

    def on_outputs(self, outputs: list[TokenOutput]) -> None:
        for output in outputs:
            live = self._live.get(output.handle)
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

    def next_handle(self) -> int:
        """A handle that no sequence has had."""
        return next(self._handles)

    # ---- inside ----

    def _take(
        self,
        request_id: str,
        channel: ResponseChannel,
        parse: Callable[[], GenerateRequest],
        short: bool = False,
    ) -> None:
        """Register a request and have it validated, or tell its channel why not."""
        handle = self.next_handle()
        live = LiveRequest(handle, request_id, channel, self._senders[handle % len(self._senders)])
        refusal = self._refusal()
        if not self._started or not self._live.add(live):
            live.error = (refusal or ShuttingDownError("the server has stopped")).to_dict()
            self._deliver(live)  # no sender runs
            return
        if refusal is not None:
            live.fail(refusal)
        else:
            try:
                self._intake.take(live, parse, short)
            except ShuttingDownError as error:  # it has been stopped since
                live.fail(error)
        # Last, as these would only keep the request from the engine.
        self._metrics.in_flight(len(self._live))
        self._poller.poke_if_idle()

    def _refusal(self) -> LoraxError | None:
        if self._dead_reason is not None:
            return self._dead_error()
        if self._draining or not self._started:
            return ShuttingDownError("the server takes no new requests; send it to another one or later")
        return self.admission.refusal(len(self._live))

    def _dead_error(self) -> EngineDeadError:
        return EngineDeadError(f"the engine has stopped: {self._dead_reason}; the server must be restarted")

    def _deliver(self, live: LiveRequest) -> None:
        """Send what has become of one request (its sender's thread)."""
        outputs = live.take()
        if live.ended:
            return
        try:
            event = self._next_event(live, outputs)
            if event is None:
                return
            final = event.final
            if final:
                event.timings = live.timings(time.monotonic())
            live.channel.send(event, live.request)
        except Exception as error:
            self._give_up(live, error)
            return
        if final:
            live.ended = True
            self._finish(live, event)

    def _next_event(self, live: LiveRequest, outputs: list[TokenOutput]) -> GenerationEvent | None:
        builder = live.builder
        if live.error is not None:
            if (
                live.error.get("error_type") == OverloadedError.error_type
            ):  # the engine does not know how long
                live.error.setdefault("retry_after_s", self.admission.retry_after_s)
            return GenerationEvent(
                error=live.error,
                prompt_tokens=builder.prompt_tokens if builder else 0,
                generated_tokens=builder.generated_tokens if builder else 0,
            )
        if builder is None or not outputs:
            return None
        event = builder.add(outputs)
        if builder.stopped:
            self.cancel_in_engine(live)
        return event

    def _give_up(self, live: LiveRequest, error: Exception) -> None:
        """The event could not be built or sent: end this request alone, telling the caller if that is possible."""
        logger.warning("request %s: cannot deliver: %s: %s", live.request_id, type(error).__name__, error)
        self.cancel_in_engine(live)
        reason = f"the answer could not be delivered: {type(error).__name__}: {error}"
        event = GenerationEvent(
            error=GenerationError(reason).to_dict(), timings=live.timings(time.monotonic())
        )
        try:
            live.channel.send(event, live.request)
        except Exception:
            logger.debug("request %s: its channel is broken", live.request_id)
        live.ended = True
        self._finish(live, event)

    def _finish(self, live: LiveRequest, event: GenerationEvent) -> None:
        """Forget a request, or one sequence of it, whose final event is out."""
        if live.group is None or live.group.closed_by(live):
            tokens = live.group.generated_tokens if live.group else event.generated_tokens
            if event.error is not None:
                self._metrics.failed(str(event.error.get("error_type")), live.request)
            else:
                adapter = live.request.adapter if live.request is not None else None
                self._metrics.succeeded(event.timings or {}, tokens, adapter)
                self.admission.finished((event.timings or {}).get("total", 0.0))
        self.admission.leave(live.handle)
        self._live.remove(live)
        self._metrics.in_flight(len(self._live))

    def end(self, live: LiveRequest, error: LoraxError) -> None:
        """End a request with an error and free what the engine holds for it."""
        live.fail(error)
        self.cancel_in_engine(live)

    def cancel_in_engine(self, live: LiveRequest) -> None:
        """Free what the engine holds for a sequence."""
        if self._dead_reason is not None:
            return
        try:
            self.engine.cancel(live.handle)
        except LoraxError as error:  # the engine has just gone; `on_dead` follows
            logger.debug("request %s: not cancelled: %s", live.request_id, error.message)

    def _cancel_gone(self, live: LiveRequest) -> None:
        self.end(live, CancelledError("the client has cancelled the request or gone away"))

    def _fail_all(self, error: LoraxError) -> None:
        for live in self._live.snapshot():
            if live.ended:  # a failure kept its sender from forgetting it
                self._live.remove(live)
            else:
                live.fail(error)

    def _crashed(self, thread: str, error: BaseException) -> None:
        """A service thread met an error it does not expect: nothing can be trusted, so everyone is told."""
        logger.critical("thread %s failed", thread, exc_info=error)
        self.on_dead(f"thread {thread} failed: {type(error).__name__}: {error}")
