"""Which adapter a model's name stands for, and the list of models."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from lorax_triton.openai_api.backend import Backend
from lorax_triton.openai_api.errors import ApiError

# The server's word for "no adapter", even where it has a default one.
BASE_MODEL_ID = "__base_model__"
_STARTED = int(time.time())
_OWNER = "lorax-triton"


async def base_model(backend: Backend) -> str:
    """The base model's id."""
    return str((await backend.info()).get("model_id") or "")


async def adapter_of_model(name: str, backend: Backend) -> str | None:
    """The adapter id to send for a model's name; None leaves the choice to the server.

    "" is whatever the server serves by default, the base model's id is the base model, `base:adapter` and any other
    name are an adapter: its id or an alias, both of which the server knows.
    """
    name = name.strip()
    if not name:
        return None
    base = await base_model(backend)
    if name in (base, BASE_MODEL_ID):
        return BASE_MODEL_ID
    if base and name.startswith(base + ":"):
        return name[len(base) + 1 :].strip() or BASE_MODEL_ID
    return name


async def list_models(backend: Backend) -> dict[str, Any]:
    """The body of `GET /v1/models`: the base model, the adapters the server knows, and its aliases."""
    base = await base_model(backend)
    models = [_model(base, root=base, parent=None)]
    seen = {base}
    for adapter in await backend.adapters():
        model = _adapter_model(adapter, base)
        if model["id"] and model["id"] not in seen:
            seen.add(model["id"])
            models.append(model)
    for alias, targets in (await backend.aliases()).items():
        if alias not in seen:
            seen.add(alias)
            models.append(_model(alias, root=_root(alias, targets), parent=base))
    return {"object": "list", "data": models}


async def get_model(name: str, backend: Backend) -> dict[str, Any]:
    """The body of `GET /v1/models/{name}`.

    Raises:
        ApiError: the server does not know the model (yet): an adapter is known from its first use on.
    """
    base = await base_model(backend)
    wanted = name[len(base) + 1 :] if base and name.startswith(base + ":") else name
    for model in (await list_models(backend))["data"]:
        if model["id"] == wanted:
            return dict(model)
    raise ApiError(f"The model '{name}' does not exist", "model", "model_not_found", 404)


def _model(name: str, root: str, parent: str | None) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": _STARTED,
        "owned_by": _OWNER,
        "root": root,
        "parent": parent,
    }


def _adapter_model(adapter: Mapping[str, Any], base: str) -> dict[str, Any]:
    name = str(adapter.get("id") or adapter.get("adapter_id") or "")
    revision = adapter.get("revision")
    model = _model(f"{name}@{revision}" if revision else name, root=name, parent=base)
    for key in ("source", "revision", "rank", "tier", "status", "pinned"):
        if adapter.get(key) is not None:
            model[key] = adapter[key]
    return model


def _root(alias: str, targets: Any) -> str:
    """The adapter that an alias stands for; itself if there are several."""
    if isinstance(targets, list) and len(targets) == 1 and isinstance(targets[0], Mapping):
        return str(targets[0].get("adapter_id") or alias)
    return alias
