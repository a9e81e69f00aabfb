"""Everything needed to serve, from a configuration: for the Triton model and for use as a library."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from lorax_backend.config import ServerConfig
from lorax_backend.errors import LoraxError
from lorax_backend.model_source import resolve_model, resolve_tokenizer
from lorax_backend.serving.adapter_templates import FileSource
from lorax_backend.serving.prompt_tokenizer import PromptTokenizer
from lorax_backend.serving.service import GenerationService
from lorax_backend.serving.tokenizer import TokenizerPool
from lorax_backend.smollm2 import ModelSourceError

Progress = Callable[[str], None]


def open_prompt_tokenizer(config: ServerConfig, progress: Progress | None = None) -> PromptTokenizer:
    """Get the model's files and load its tokenizer alone. Call the result's `close` at the end.

    Raises:
        RuntimeError: the model or its tokenizer cannot be had; the message says why.
    """
    tokenizer = _load_tokenizer(config, resolve_model(config, progress), progress)
    try:
        return PromptTokenizer(config, tokenizer, partial(_adapter_sources, config))
    except LoraxError as error:
        raise RuntimeError(error.message) from error


def open_service(config: ServerConfig, progress: Progress | None = None) -> GenerationService:
    """Get the model's files, load them, and return a service that is ready. Call its `stop` at the end.

        with contextlib.closing(open_service(ServerConfig())) as service:
            for event in service.generate(service.request("Hello", max_tokens=8, stream=True)):
                ...

    Raises:
        RuntimeError: with a readable reason, if the model cannot be served.
    """
    from lorax_backend.engine.build import create_engine  # the only import that brings torch in

    model_path = resolve_model(config, progress)
    tokenizer = _load_tokenizer(config, model_path, progress)
    engine = create_engine(config, model_path, progress)
    try:
        service = GenerationService(engine, tokenizer, config, partial(_adapter_sources, config))
    except LoraxError as error:
        raise RuntimeError(error.message) from error
    service.start()
    return service


def _adapter_sources(config: ServerConfig) -> Mapping[str, FileSource]:
    from lorax_backend.adapters.sources.registry import (
        create_sources,
    )  # the hub's library takes time to import

    return create_sources(config)


def _load_tokenizer(config: ServerConfig, model_path: Path, progress: Progress | None) -> TokenizerPool:
    try:
        return TokenizerPool(resolve_tokenizer(config, model_path, progress), model_path)
    except LoraxError as error:
        raise RuntimeError(f"cannot load the tokenizer: {error.message}") from error
    except ModelSourceError:
        raise
    except Exception as error:  # the Rust tokenizer raises bare Exceptions about files it cannot read
        raise RuntimeError(f"cannot load the tokenizer: {error}") from error
