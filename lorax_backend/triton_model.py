"""The `lorax` model as Triton's Python backend sees it: decodes requests and hands them on, nothing else.

Heavy imports are inside `initialize`: with auto-complete on, Triton imports this module in a second process
only to ask for the configuration.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from lorax_backend.errors import LoraxError, ShuttingDownError, ValidationError
from lorax_backend.tensors import INPUTS, OUTPUTS
from lorax_backend.triton_io import TritonChannel, decode_request
from lorax_backend.triton_setup import (
    complete_config,
    model_exception,
    read_config,
    report_engine_death,
    report_progress,
    set_up_logging,
)

if TYPE_CHECKING:
    from lorax_backend.config import ServerConfig
    from lorax_backend.serving.service import GenerationService
    from lorax_backend.triton_metrics import MetricsMirror

_log = logging.getLogger(__name__)
_STOP_S = 5.0
_WATCH_S = 0.5
# Instead of 5 ms, for which a long prompt that is being checked would keep back everybody's tokens, more than once.
_SWITCH_INTERVAL_S = 0.0005


class TritonPythonModel:
    """Owns the service, which owns the engine. Triton calls `execute` from one thread."""

    _service: GenerationService | None = None
    _metrics: MetricsMirror | None = None
    _control: ThreadPoolExecutor | None = None
    _finalizing: threading.Event | None = None

    @staticmethod
    def auto_complete_config(auto_complete_model_config: Any) -> Any:
        complete_config(auto_complete_model_config, INPUTS, OUTPUTS)
        auto_complete_model_config.set_model_transaction_policy({"decoupled": True})
        return auto_complete_model_config

    def initialize(self, args: dict[str, str]) -> None:
        """Load the model; may take minutes, and Triton waits."""
        try:
            self._start(read_config(args), args)
        except Exception as error:
            _log.exception("the model cannot be loaded")
            self.finalize()
            raise model_exception(error) from None

    def _start(self, config: ServerConfig, args: dict[str, str]) -> None:
        set_up_logging(config)
        sys.setswitchinterval(_SWITCH_INTERVAL_S)
        from lorax_backend.serving.local import open_service
        from lorax_backend.triton_metrics import MetricsMirror

        self._service = open_service(config, report_progress)
        self._control = ThreadPoolExecutor(2, thread_name_prefix="control")
        labels = {"model": args["model_name"], "version": args["model_version"]}
        self._metrics = MetricsMirror(self._service.metrics, labels)
        self._finalizing = threading.Event()
        threading.Thread(
            target=_watch, args=(self._service, self._finalizing), name="engine-watch", daemon=True
        ).start()
        gc.collect()
        gc.freeze()  # what has been loaded stays: no collection, which holds up every stream, looks at it again
        _log.info("ready, process %d", os.getpid())

    def execute(self, requests: list[Any]) -> None:
        """Take in requests; their answers come from the service's sender threads. Meanwhile Triton brings no others."""
        for request in requests:
            channel = TritonChannel(request.get_response_sender())
            try:
                self._take(request, channel)
            except LoraxError as error:
                channel.send_error(error)
            except Exception as error:
                _log.exception("a request could not be taken in")
                channel.send_error(LoraxError(f"the request could not be taken in: {error}"))

    def _take(self, request: Any, channel: TritonChannel) -> None:
        raw = decode_request(request)
        if self._service is None or self._control is None:
            raise ShuttingDownError("the server is shutting down; send the request to another one")
        command = raw.fields.get("control")
        if command is None:
            self._service.submit(raw, channel)
        else:
            self._control.submit(self._answer_control, self._service, command, channel)

    @staticmethod
    def _answer_control(service: GenerationService, text: str, channel: TritonChannel) -> None:
        try:
            arguments = _control_command(text)
            channel.send_details(service.control(arguments.pop("command"), arguments))
        except LoraxError as error:
            channel.send_error(error)
        except Exception as error:
            _log.exception("a control command failed")
            channel.send_error(LoraxError(f"control: the command failed: {error}"))

    def is_ready(self) -> bool:
        """Asked by tritonserver 26.03 and newer for the model's readiness."""
        return self._service is not None and self._service.ready

    def finalize(self) -> None:
        """Stop everything within seconds; requests still running get an error."""
        service, metrics, control = self._service, self._metrics, self._control
        self._service = self._metrics = self._control = None
        if self._finalizing is not None:
            self._finalizing.set()
        if control is not None:
            control.shutdown(wait=False)
        if metrics is not None:
            metrics.stop(_STOP_S)
        if service is not None:
            service.stop()


def _watch(service: GenerationService, finalizing: threading.Event) -> None:
    """Say so once if the service stops taking requests by itself."""
    while not finalizing.wait(_WATCH_S):
        if not service.ready and not finalizing.is_set():
            try:
                service.control("stats")
                reason = "the service has stopped; see the log above"
            except LoraxError as error:
                reason = error.message
            report_engine_death(reason)
            return


def _control_command(text: str) -> dict[str, Any]:
    """Parse a control input: {"command": name, ...}.

    Raises:
        ValidationError: not that.
    """
    example = '{"command": "stats"}'
    try:
        command = json.loads(text)
    except ValueError as error:
        raise ValidationError(f"control: not valid JSON ({error}); send something like {example}") from None
    if not isinstance(command, dict) or not isinstance(command.get("command"), str):
        raise ValidationError(f"control: expected a JSON object with a command, such as {example}")
    return command
