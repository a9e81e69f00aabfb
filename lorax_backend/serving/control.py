"""Control commands: what an operator or a gateway may ask a running service."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from lorax_backend.errors import ValidationError

if TYPE_CHECKING:
    from lorax_backend.serving.service import GenerationService

ENGINE_COMMANDS = ("stats", "adapters", "check")
COMMANDS = ("cancel", "info", "metrics", "tokenize", *ENGINE_COMMANDS)


def run_command(service: GenerationService, command: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Answer one of `COMMANDS`; those of the engine are passed on to it.

    Raises:
        ValidationError: unknown command or bad arguments.
        EngineDeadError: the engine does not answer.
    """
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
    if command in ENGINE_COMMANDS:
        return service.engine.control(command, arguments)
    raise ValidationError(f"control.command: {command!r} is not one of {', '.join(COMMANDS)}")


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
        "max_active_adapters": config.max_active_adapters,
        "max_prompt_bytes": config.max_prompt_bytes,
        "validation_workers": config.validation_workers,
        "default_adapter_source": config.default_adapter_source,
        "has_chat_template": tokenizer.has_chat_template,
        "vocab_size": tokenizer.vocab_size,
        "eos_token_ids": list(tokenizer.eos_token_ids),
        "ready": service.ready,
        "live_requests": service.num_live,
    }
