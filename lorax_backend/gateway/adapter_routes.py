"""Routes that administer adapters, with LoRAX-like names and with vLLM's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from lorax_backend.gateway.auth import admin_key, hub_token, require_admin, require_user
from lorax_backend.gateway.bodies import AdapterBody, LoadLoraAdapterBody, UnloadLoraAdapterBody, read_model
from lorax_backend.gateway.errors import HttpError
from lorax_backend.gateway.state import GatewayState, state_of

# What a path's last word asks of the engine, and whether only the adapter's own server is asked.
ACTIONS: Mapping[str, tuple[str, bool]] = {
    "load": ("adapter_preload", True),
    "pin": ("adapter_pin", True),
    "unpin": ("adapter_unpin", False),
    "unload": ("adapter_unload", False),
    "reload": ("adapter_reload", False),
    "purge": ("adapter_purge", False),
}


async def list_adapters(request: Request) -> Response:
    """GET /adapters: what is known of every adapter that the caller may know of (tier, status, users), and names that
    stand for some."""
    state = state_of(request)
    require_user(request, state.config)
    aliases = await state.pool.control("aliases", {})
    return JSONResponse(
        {
            "adapters": await state.adapters(admin_key(request, state.config)),
            "aliases": aliases.get("aliases", {}),
        }
    )


async def adapter_action(request: Request) -> Response:
    """POST /adapters/{load,pin,unpin,unload,reload,purge}."""
    name = request.path_params["action"]
    if name not in ACTIONS:
        raise HttpError(404, "not_found", f"no such action; /adapters/ knows {', '.join(ACTIONS)}")
    state, body, key = await _read(request, AdapterBody)
    command, owner_only = ACTIONS[name]
    arguments = {field: value for field, value in body.items() if value is not None}
    return JSONResponse(await _run(state, command, arguments | key, body, owner_only))


async def load_lora_adapter(request: Request) -> Response:
    """POST /v1/load_lora_adapter: give an adapter a name, and load it."""
    state, body, key = await _read(request, LoadLoraAdapterBody)
    path = body["lora_path"]
    source = body.get("adapter_source") or ("local" if path.startswith("/") else None)
    target = {"adapter_id": path} | ({"adapter_source": source} if source else {})
    token = body.get("api_token")
    secret = {"api_token": token} if token else {}
    if body["lora_name"] != path:
        await state.pool.control_all("alias_set", {"alias": body["lora_name"], **target, **key})
    await _run(state, "adapter_preload", target | secret | key, target, True)
    return PlainTextResponse(f"Success: LoRA adapter '{body['lora_name']}' added successfully.")


async def unload_lora_adapter(request: Request) -> Response:
    """POST /v1/unload_lora_adapter: unload the adapter behind a name, and forget the name."""
    state, body, key = await _read(request, UnloadLoraAdapterBody)
    name = body["lora_name"]
    await state.pool.control_all("adapter_unload", {"adapter_id": name, **key})
    await state.pool.control_all("alias_delete", {"alias": name, **key})
    return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")


async def _read(
    request: Request, model: type[BaseModel]
) -> tuple[GatewayState, dict[str, Any], dict[str, Any]]:
    state = state_of(request)
    key = require_admin(request, state.config)
    _, body = await read_model(request, state.config, model)
    token = hub_token(request, state.config) if request.headers.get("x-hub-token") else None
    if token and not body.get("api_token"):
        body["api_token"] = token
    return state, body, {"admin_key": key} if key else {}


async def _run(
    state: GatewayState, command: str, arguments: dict[str, Any], adapter: Mapping[str, Any], owner_only: bool
) -> dict[str, Any]:
    if owner_only:
        key = f"{adapter.get('adapter_source') or ''}:{adapter['adapter_id']}"
        return await state.pool.control(command, arguments, key)
    answers = await state.pool.control_all(command, arguments)
    return next(iter(answers.values())) if len(answers) == 1 else {"servers": answers}
