"""What stands behind a gateway that decides by itself: servers that are functions of this process."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

from gateway_calls import GatewayCaller

from lorax_triton._transport import InferRequest, InferResponse
from lorax_triton.testing import AsyncInMemoryTransport

TOKEN = json.dumps({"id": 1, "text": "a", "logprob": -0.5, "special": False, "skipped": False})
DETAILS = {
    "finish_reason": "length",
    "prompt_tokens": 2,
    "generated_tokens": 2,
    "seed": None,
    "generated_text": "aa",
}


class FakeTriton:
    """One server. `refusal` is raised, or sent as an error, instead of an answer; `cut` leaves the details out.

    `control_refusal` is sent as an error to every command but "info"."""

    def __init__(self, name: str = "a:1") -> None:
        self.name = name
        self.refusal: Exception | str | None = None
        self.control_refusal: str | None = None
        self.ready = True
        self.cut = False
        self.after_first: Exception | None = None
        self.transport = AsyncInMemoryTransport(self._handle)

    def _handle(self, request: InferRequest) -> Iterator[InferResponse]:
        if isinstance(self.refusal, Exception):
            raise self.refusal
        if "control" in request.inputs:
            command = json.loads(request.inputs["control"].values[0])
            if self.control_refusal is not None and command["command"] != "info":
                yield InferResponse(error=self.control_refusal, final=True)
            else:
                yield InferResponse({"details": [json.dumps(self._control(command))]}, True)
            return
        if isinstance(self.refusal, str):
            yield InferResponse(error=self.refusal, final=True)
            return
        yield InferResponse({"text_output": ["a"], "tokens": [TOKEN]})
        if self.after_first is not None:
            raise self.after_first
        if self.cut:
            return
        yield InferResponse({"text_output": ["a"], "tokens": [TOKEN], "details": [json.dumps(DETAILS)]}, True)

    def _control(self, command: dict[str, Any]) -> dict[str, Any]:
        if command["command"] == "info":
            return {"model_id": "base", "device": "cpu", "ready": self.ready, "server": self.name}
        return {"adapters": [], "aliases": {}, "asked": command}

    @property
    def generations(self) -> list[InferRequest]:
        return [request for request in self.transport.requests if "control" not in request.inputs]

    @property
    def commands(self) -> list[dict[str, Any]]:
        asked = [
            request.inputs["control"].values[0]
            for request in self.transport.requests
            if "control" in request.inputs
        ]
        return [command for command in map(json.loads, asked) if command["command"] != "info"]


StartGateway = Callable[..., GatewayCaller]
