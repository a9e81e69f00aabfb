"""The OpenAPI description, and the pages that a browser is shown."""

from __future__ import annotations

import functools
import json
from importlib import resources
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response

from lorax_backend.gateway.adapter_routes import ACTIONS
from lorax_backend.gateway.responses import ErrorResponse, StreamResponse
from lorax_backend.gateway.routes import OPERATIONS, Operation

_REF = "#/components/schemas/{model}"


@functools.cache
def description(version: str) -> dict[str, Any]:
    """The OpenAPI 3.1 document."""
    models: set[type[BaseModel]] = {op.body for op in OPERATIONS if op.body} | {ErrorResponse, StreamResponse}
    models |= {op.answer for op in OPERATIONS if isinstance(op.answer, type)}
    ordered = sorted(models, key=lambda model: model.__name__)
    inputs: list[Any] = [(model, "validation") for model in ordered]
    _, schemas = models_json_schema(inputs, ref_template=_REF)
    paths: dict[str, dict[str, Any]] = {}
    for operation in OPERATIONS:
        if not operation.hidden:
            path = operation.path.replace(":path}", "}")
            paths.setdefault(path, {})[operation.method.lower()] = _operation(operation)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "lorax-triton",
            "version": version,
            "description": "One base model, thousands of LoRA adapters: LoRAX's REST API and OpenAI's over Triton.",
        },
        "paths": paths,
        "components": {
            "schemas": schemas.get("$defs", {}),
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _operation(operation: Operation) -> dict[str, Any]:
    error: dict[str, Any] = {"application/json": {"schema": _ref(ErrorResponse.__name__)}}
    if operation.tag == "OpenAI":
        error["application/json"]["schema"] = {"type": "object", "required": ["error"]}
    shown: dict[str, Any] = {
        "summary": operation.summary,
        "tags": [operation.tag],
        "operationId": f"{operation.method.lower()}_{operation.path.strip('/').replace('/', '_') or 'root'}",
        "responses": {
            "200": {"description": "fine"} | ({"content": _content(operation)} if operation.answer else {}),
            "4XX": {"description": "the request cannot be served", "content": error},
            "5XX": {"description": "the server cannot serve", "content": error},
        },
    }
    parameters: list[dict[str, Any]] = [
        {"name": name, "in": "path", "required": True, "schema": dict[str, Any](type="string")}
        for name in ("action", "model")
        if f"{{{name}" in operation.path
    ]
    if "{action}" in operation.path:
        parameters[0]["schema"]["enum"] = list(ACTIONS)
    if operation.path == "/metrics":
        kinds = {"type": "string", "enum": ["json", "prometheus"]}
        parameters.append({"name": "format", "in": "query", "required": False, "schema": kinds})
    if parameters:
        shown["parameters"] = parameters
    if operation.method == "POST":
        schema = _ref(operation.body.__name__) if operation.body else {"type": "object"}
        shown["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    return shown


def _content(operation: Operation) -> dict[str, Any]:
    # No schema: the format describes one body, and a stream is many; its events are StreamResponse.
    events: dict[str, Any] = {"text/event-stream": {}}
    if operation.path == "/metrics":
        return {
            "text/plain": {"schema": {"type": "string"}},
            "application/json": {"schema": {"type": "object"}},
        }
    if operation.answer == "text/event-stream":
        return events
    if isinstance(operation.answer, str):
        kind = "object" if operation.answer == "application/json" else "string"
        content: dict[str, Any] = {operation.answer: {"schema": {"type": kind}}}
    else:
        assert operation.answer is not None
        schema = _ref(operation.answer.__name__)
        content = {
            "application/json": {
                "schema": {"type": "array", "items": schema} if operation.answer_is_list else schema
            }
        }
    return content | (events if operation.streams else {})


def _ref(name: str) -> dict[str, str]:
    return {"$ref": _REF.format(model=name)}


async def openapi_json(request: Request) -> Response:
    """GET /api-doc/openapi.json and /openapi.json."""
    return JSONResponse(description(request.app.state.version))


def _page(name: str) -> str:
    return resources.files("lorax_backend.gateway").joinpath("static", name).read_text(encoding="utf-8")


async def docs(request: Request) -> Response:
    """GET /docs: the description as one page, without anything from elsewhere."""
    # "<" inside the data could end the script element it stands in.
    data = json.dumps(description(request.app.state.version)).replace("<", "\\u003c")
    return HTMLResponse(_page("docs.html").replace("__OPENAPI__", data))


async def playground(request: Request) -> Response:
    """GET /playground."""
    return HTMLResponse(
        _page("playground.html"),
        headers={"content-security-policy": "default-src 'self' 'unsafe-inline'; img-src data:"},
    )
