"""From a request received to its sequences in the engine: checks, the choice of the adapter, tokenization."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

from lorax_backend.errors import CancelledError, GenerationError, LoraxError, ShuttingDownError
from lorax_backend.serving.adapter_templates import AdapterTemplates, FileSource
from lorax_backend.serving.answer import AnswerBuilder, PreparedPrompt
from lorax_backend.serving.delivery import LiveRequest
from lorax_backend.serving.given import RawRequest
from lorax_backend.serving.lanes import Lanes
from lorax_backend.serving.prompt import prepare, sibling
from lorax_backend.serving.sequences import SequenceGroup
from lorax_backend.serving.template_sandbox import SandboxedTemplate
from lorax_backend.types import AdapterRef, EngineRequest, GenerateRequest

if TYPE_CHECKING:
    from lorax_backend.serving.service import GenerationService

logger = logging.getLogger(__name__)

# Threads that wait for adapters' own chat templates, each with a process in which it is rendered.
_RENDER_THREADS = 4
# What is short, in characters and token ids, is checked and tokenized in well under a millisecond. To hand it to
# another thread, which must be woken and be given the interpreter's lock, takes some tenths of one.
_SHORT_TEXT = 2048
_SHORT_IDS = 4096

_Fetch = tuple[AdapterRef, str | None]  # with whose token


def is_short(raw: RawRequest) -> bool:
    """True if nothing that the caller sent is long."""
    return all(
        len(value) <= (_SHORT_TEXT if isinstance(value, str) else _SHORT_IDS)
        for values in (raw.fields, raw.parameters)
        for value in values.values()
        if isinstance(value, str | list | dict)
    )


def _stopped() -> ShuttingDownError:
    return ShuttingDownError("the server has stopped")


class Intake:
    """Prepares requests on its own threads: those of validation, which never wait for a network or a stranger's
    program, those that fetch what an adapter brings along, and those that wait for a template it brought, of which no
    adapter takes more than one. A short request that comes alone is prepared where it is taken instead.

    Args:
        host: the service; its engine, tables and metrics are used.
        adapter_sources: makes the sources in which adapters' own chat templates are looked for.
    """

    def __init__(
        self, host: GenerationService, adapter_sources: Callable[[], Mapping[str, FileSource]]
    ) -> None:
        self._host = host
        config = host.config
        self.adapter_templates = AdapterTemplates(adapter_sources, host.tokenizer.special_tokens)
        self._pool = ThreadPoolExecutor(max(1, config.validation_workers), "lorax-validate")
        # Apart from the pool above: fetching an adapter may take as long as a download.
        self._fetchers = ThreadPoolExecutor(max(1, config.adapter_loader_threads), "lorax-fetch")
        self._renderers = Lanes(_RENDER_THREADS, "lorax-render")
        self._lock = threading.Lock()
        self._waiting: dict[_Fetch, list[tuple[LiveRequest, GenerateRequest]]] = {}
        self._num_queued = 0  # requests that the pool has and has not done with
        self._stopped = False

    def take(self, live: LiveRequest, parse: Callable[[], GenerateRequest], short: bool = False) -> None:
        """Prepare a request soon; whatever becomes of it reaches its channel. One that is `short` is prepared on this
        very thread if nobody waits before it.

        Raises:
            ShuttingDownError: the intake has been stopped.
        """
        if self._stopped:
            raise _stopped()
        if short and not self._num_queued:
            self._guarded(live, lambda: self._validate(live, parse, here=True))
        else:
            self._queue(live, lambda: self._validate(live, parse))

    def stop(self) -> None:
        """Take nothing more; what has not begun is dropped."""
        self._stopped = True
        for pool in (self._pool, self._fetchers):
            pool.shutdown(wait=False, cancel_futures=True)
        self._renderers.stop()
        self.adapter_templates.close()

    def _queue(self, live: LiveRequest, work: Callable[[], None]) -> None:
        """Have the pool do a part of a request's preparation.

        Raises:
            ShuttingDownError: the intake has been stopped.
        """
        with self._lock:
            self._num_queued += 1
        try:
            self._pool.submit(self._run_queued, live, work)
        except RuntimeError:
            raise _stopped() from None

    def _run_queued(self, live: LiveRequest, work: Callable[[], None]) -> None:
        try:
            self._guarded(live, work)
        finally:
            with self._lock:
                self._num_queued -= 1

    def _guarded(self, live: LiveRequest, work: Callable[[], None]) -> None:
        """Run a part of a request's preparation; what goes wrong ends that request alone."""
        if live.failing():
            return
        try:
            work()
        except LoraxError as error:
            live.fail(error)
        except Exception as error:
            logger.exception("request %s failed before it reached the engine", live.request_id)
            live.fail(GenerationError(f"internal error: {type(error).__name__}: {error}"))

    def _validate(self, live: LiveRequest, parse: Callable[[], GenerateRequest], here: bool = False) -> None:
        """Check the request and choose its adapter. `here` says that this is the thread that brought it, which does no
        more than a short prompt for one answer takes."""
        host = self._host
        request = parse()
        live.request = request
        host.service_metrics.received(request.stream)
        request.adapter = ref = host.aliases.resolve(request)
        host.admission.enter(live.handle, ref)
        if live.ended:  # cancelled meanwhile, and forgotten before it was counted
            host.admission.leave(live.handle)
        if here and (request.messages is not None or max(request.n, request.best_of) > 1):
            self._queue(live, lambda: self._choose_template(live, request, ref))
        else:
            self._choose_template(live, request, ref)

    def _choose_template(self, live: LiveRequest, request: GenerateRequest, ref: AdapterRef | None) -> None:
        """Go on to the preparation, in which a chat for an adapter takes the template it brought along, if any."""
        if request.messages is None or ref is None:
            self._prepare(live, request)
        elif self.adapter_templates.known(ref):
            self._render_or_prepare(live, request, ref)
        else:
            self._fetch_and_prepare(live, request, ref)

    def _fetch_and_prepare(self, live: LiveRequest, request: GenerateRequest, ref: AdapterRef) -> None:
        """Prepare once the adapter's files are here. All who wait for the same files wait for one fetch, so that they
        take one thread and leave the others to other adapters."""
        key = (ref, request.api_token)
        with self._lock:
            waiting = self._waiting.setdefault(key, [])
            waiting.append((live, request))
            if len(waiting) > 1:
                return
        self._fetchers.submit(self._fetch, key)

    def _fetch(self, key: _Fetch) -> None:
        error: LoraxError | None = None
        try:
            self.adapter_templates.get(*key)
        except LoraxError as problem:
            error = problem
        except Exception as problem:
            logger.exception("the files of adapter %s could not be looked at", key[0])
            error = GenerationError(f"internal error: {type(problem).__name__}: {problem}")
        with self._lock:
            waiting = self._waiting.pop(key)
        for live, request in waiting:
            if error is not None:
                live.fail(error)
            else:
                self._guarded(live, partial(self._render_or_prepare, live, request, key[0]))

    def _render_or_prepare(self, live: LiveRequest, request: GenerateRequest, ref: AdapterRef) -> None:
        """Prepare here with the base model's template, or elsewhere with the adapter's own."""
        template = self.adapter_templates.get(ref, request.api_token)
        if template is None:
            self._prepare(live, request)
        else:
            work = partial(self._prepare, live, request, template)
            self._renderers.submit(ref, partial(self._guarded, live, work))

    def _prepare(
        self, live: LiveRequest, request: GenerateRequest, template: SandboxedTemplate | None = None
    ) -> None:
        """Tokenize and hand to the engine."""
        host = self._host
        first = prepare(request, live.handle, host.tokenizer, host.limits, template)
        live.validated_at = time.monotonic()
        host.service_metrics.validated(
            live.validated_at - live.received_at, len(first[1].ids), first[0].sampling.max_new_tokens
        )
        if max(request.n, request.best_of) == 1:
            self._launch(live, request, *first)
        else:
            self._launch_group(live, request, *first)

    def _launch(
        self,
        live: LiveRequest,
        request: GenerateRequest,
        engine_request: EngineRequest,
        prompt: PreparedPrompt,
    ) -> None:
        live.builder = AnswerBuilder(request, self._host.tokenizer, prompt)
        live.wake_on_token = request.stream or bool(request.stop)
        self._host.engine.submit(engine_request)
        if live.failing():  # ended meanwhile: its cancel may have reached the engine before the submit
            self._host.cancel_in_engine(live)

    def _launch_group(
        self, live: LiveRequest, request: GenerateRequest, first: EngineRequest, prompt: PreparedPrompt
    ) -> None:
        """Start all sequences of a request for several; each is a live request whose events meet in a group."""
        group = SequenceGroup(request, live.channel, self._cancel_member)
        group.members.append(live)
        live.group, live.channel = group, group.member(0)
        if live.failing():  # its error may have gone out before the group stood in the way
            return
        self._launch(live, request, first, prompt)
        for number in range(1, group.total):
            twin = LiveRequest(self._host.next_handle(), live.request_id, group.member(number), live.sender)
            twin.request, twin.group = request, group
            twin.received_at, twin.validated_at = live.received_at, live.validated_at
            group.members.append(twin)
            if live.failing() or group.over() or not self._host.live.add(twin):
                return
            engine_request, own = sibling(first, prompt, twin.handle, number, request.seed_given)
            try:
                self._launch(twin, request, engine_request, own)
            except LoraxError as error:
                twin.fail(error)
            if group.over():
                self._cancel_member(twin)

    def _cancel_member(self, live: LiveRequest) -> None:
        self._host.end(live, CancelledError("the request has ended"))
