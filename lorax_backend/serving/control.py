"""Control commands: what an operator or a gateway may ask a running service."""

from __future__ import annotations

import hmac
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from lorax_backend.config import ServerConfig
from lorax_backend.errors import LoraxError, UnauthorizedError, ValidationError
from lorax_backend.serving.adapter_fields import adapter_ref
from lorax_backend.serving.aliases import AliasTable
from lorax_backend.types import BASE_MODEL_ID, AdapterRef

if TYPE_CHECKING:
    from lorax_backend.serving.service import GenerationService

ENGINE_COMMANDS = ("stats", "adapters", "check")
# Whatever begins so is the engine's business too, and changes what it holds.
ADAPTER_PREFIX = "adapter_"
ADMIN_COMMANDS = ("alias_set", "alias_delete", "reset_prefix_cache")
COMMANDS = ("cancel", "info", "metrics", "tokenize", "aliases", *ADMIN_COMMANDS, *ENGINE_COMMANDS)
_ADAPTER_COMMANDS_TEXT = (
    "adapter_preload, adapter_pin, adapter_unpin, adapter_unload, adapter_reload, adapter_purge"
)
_PRELOAD_TIMEOUT_S = 60.0
_NAMING_STATS = ("running", "waiting", "popular")  # of `adapter_tiers`: lists of adapters' names


def run_command(service: GenerationService, command: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Answer one command; those about adapters, and the engine's own, are passed on to it.

    Raises:
        ValidationError: unknown command or bad arguments.
        UnauthorizedError: the command changes something, and its `admin_key` is missing or wrong. Commands that only
            look need none, but without it they tell nothing of adapters that not everybody may use.
        EngineDeadError: the engine does not answer.
    """
    arguments = dict(arguments)
    key = arguments.pop("admin_key", None)
    if command in ADMIN_COMMANDS or command.startswith(ADAPTER_PREFIX):
        _authorize(service.config, key, command)
    if command == "cancel":
        request_id = arguments.get("request_id")
        if not isinstance(request_id, str) or not request_id:
            raise ValidationError("control.request_id: expected the id of the request to cancel, a text")
        return {"cancelled": service.cancel(request_id)}
    if command == "info":
        return describe(service)
    if command == "metrics":
        return {"prometheus": service.metrics.render()}
    if command == "tokenize":
        return {"tokens": _tokenize(service, arguments)}
    if command == "aliases":
        return {"aliases": service.aliases.describe()}
    if command == "alias_set":
        return _set_alias(service.aliases, arguments)
    if command == "alias_delete":
        return {"deleted": service.aliases.delete(arguments.get("alias"))}
    if command.startswith(ADAPTER_PREFIX):
        service.adapter_templates.forget()
        return service.engine.control(command, _engine_arguments(service, arguments))
    if command in ENGINE_COMMANDS or command == "reset_prefix_cache":
        answer = service.engine.control(command, arguments)
        return answer if _is_admin(service.config, key) else _without_private_adapters(answer)
    raise ValidationError(
        f"control.command: {command!r} is not one of {', '.join(COMMANDS)}, {_ADAPTER_COMMANDS_TEXT}"
    )


def preload_adapters(service: GenerationService) -> None:
    """Have the adapters of the options loaded and pinned; returns before they are.

    Raises:
        RuntimeError: an option names an adapter that cannot be meant, or the engine refuses it.
    """
    config = service.config
    names = [name.strip() for name in config.preloaded_adapter_ids.split(",") if name.strip()]
    wanted = [(name, config.preloaded_adapter_source) for name in names]
    if config.adapter_id and config.adapter_id != BASE_MODEL_ID:
        wanted.append((config.adapter_id, config.adapter_source))
    for name, source in dict.fromkeys(wanted):
        try:
            for ref in _refs(service, name, source, None):
                service.engine.control(
                    "adapter_preload", {**_engine_fields(ref), "pin": True}, _PRELOAD_TIMEOUT_S
                )
        except LoraxError as error:
            raise RuntimeError(f"adapter {name} cannot be preloaded: {error.message}") from error


def _authorize(config: ServerConfig, key: Any, command: str) -> None:
    if not config.admin_api_key:
        if config.allow_unauthenticated_admin:
            return
        raise UnauthorizedError(
            f"control.command: {command} changes the server, which needs an administrator's key, and this server has "
            "none; set its option admin_api_key (or allow_unauthenticated_admin where every caller is trusted)"
        )
    if not _is_admin(config, key):
        problem = "is missing" if key is None else "is wrong"
        raise UnauthorizedError(f"control.admin_key: {problem}; {command} needs the server's admin_api_key")


def _is_admin(config: ServerConfig, key: Any) -> bool:
    if not config.admin_api_key:
        return config.allow_unauthenticated_admin
    given = key.encode(errors="replace") if isinstance(key, str) else b""
    return hmac.compare_digest(given, config.admin_api_key.encode())


def _without_private_adapters(answer: dict[str, Any]) -> dict[str, Any]:
    """What may be told to anybody: of adapters only those that anybody may use, for who may not use an adapter has no
    right to know that it is here."""
    shown = dict(answer)
    if "adapters" in answer:
        shown["adapters"] = [row for row in answer["adapters"] if row.get("public")]
    if "adapter_tiers" in answer:
        tiers = answer["adapter_tiers"]
        shown["adapter_tiers"] = {name: value for name, value in tiers.items() if name not in _NAMING_STATS}
    return shown


def _engine_arguments(service: GenerationService, arguments: dict[str, Any]) -> dict[str, Any]:
    """An adapter named as in a request (alias, id@revision, address) becomes id, source and revision."""
    name = arguments.get("adapter_id")
    if name is None:
        return arguments
    source, revision = arguments.get("adapter_source") or "", arguments.get("revision")
    if not isinstance(name, str) or not name:
        raise ValidationError("control.adapter_id: expected the id of an adapter, a text")
    if not isinstance(source, str) or not isinstance(revision, str | None):
        raise ValidationError("control.adapter_source, control.revision: expected texts")
    refs = _refs(service, name, source, revision)
    if not refs:
        raise ValidationError(f"control.adapter_id: {name} is the base model, which is always loaded")
    if len(refs) > 1:
        raise ValidationError(
            f"control.adapter_id: alias {name} leads to {len(refs)} adapters; name one of them"
        )
    return {**arguments, **_engine_fields(refs[0])}


def _refs(service: GenerationService, name: str, source: str, revision: str | None) -> list[AdapterRef]:
    """The adapters that a name, which may be an alias, stands for."""
    refs = service.aliases.adapters(name)
    if refs is not None:
        return refs
    ref = adapter_ref(name, source, revision, service.config)
    return [] if ref is None else [ref]


def _engine_fields(ref: AdapterRef) -> dict[str, Any]:
    fields: dict[str, Any] = {"adapter_id": ref.id, "adapter_source": ref.source}
    return fields if ref.revision is None else {**fields, "revision": ref.revision}


def _set_alias(aliases: AliasTable, arguments: dict[str, Any]) -> dict[str, Any]:
    """{alias, targets: [{adapter_id, adapter_source?, revision?, weight?}]} or {alias, adapter_id, ...}."""
    fields = {key: value for key, value in arguments.items() if key not in ("alias", "targets")}
    targets = arguments.get("targets")
    if targets is not None and fields:
        raise ValidationError(f"control.targets: given beside {', '.join(fields)}; give one form")
    return aliases.set(arguments.get("alias"), [fields] if targets is None else targets)


def _tokenize(service: GenerationService, arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """`inputs` as a list of tokens `{id, text, start, stop}`, offsets in characters."""
    text = arguments.get("inputs")
    if not isinstance(text, str) or not text:
        raise ValidationError("control.inputs: expected the text to tokenize, not empty")
    limit = service.config.max_prompt_bytes
    if len(text) > limit:
        raise ValidationError(
            f"control.inputs: {len(text)} characters, at most {limit} are allowed (server option max_prompt_bytes)"
        )
    add_special_tokens = arguments.get("add_special_tokens")
    if not isinstance(add_special_tokens, bool | None):
        raise ValidationError("control.add_special_tokens: expected true or false")
    return service.tokenizer.pieces(text, add_special_tokens is not False)


def describe(service: GenerationService) -> dict[str, Any]:
    """Facts about the model, and the limits that requests must keep."""
    config, tokenizer = service.config, service.tokenizer
    return {
        **asdict(service.engine.info),
        "max_concurrent_requests": config.max_concurrent_requests,
        "max_stop_sequences": config.max_stop_sequences,
        "max_best_of": config.max_best_of,
        "max_n": config.max_n,
        "max_requests_per_adapter": config.max_requests_per_adapter,
        "default_adapter_id": config.adapter_id,
        "max_active_adapters": config.max_active_adapters,
        "max_prompt_bytes": config.max_prompt_bytes,
        "validation_workers": config.validation_workers,
        "default_adapter_source": config.default_adapter_source,
        "has_chat_template": tokenizer.has_chat_template,
        "chat_template_variables": sorted(tokenizer.chat_template_variables),
        "vocab_size": tokenizer.vocab_size,
        "eos_token_ids": list(tokenizer.eos_token_ids),
        "ready": service.ready,
        "live_requests": service.num_live,
    }
