"""What the Python models of the repository do alike when Triton loads them."""

from __future__ import annotations

import json
import logging
import sys
from typing import Any

import triton_python_backend_utils as pb_utils

from lorax_backend.config import ServerConfig, load_config
from lorax_backend.errors import LoraxError
from lorax_backend.server.failure import ENGINE_DEAD_MARK
from lorax_backend.server.repository import config_type
from lorax_backend.tensors import TensorSpec


def read_config(args: dict[str, str]) -> ServerConfig:
    """The options from the model configuration's `parameters` and the environment.

    Raises:
        ValueError: naming every option that is unknown or cannot be read.
    """
    parameters = json.loads(args["model_config"]).get("parameters", {})
    return load_config({key: value["string_value"] for key, value in parameters.items()})


def set_up_logging(config: ServerConfig) -> None:
    """Log to the server's stderr. Triton's own logger would cost a round trip to the server per line."""
    logging.basicConfig(
        level=config.log_level.upper(),
        stream=sys.stderr,
        format="%(levelname)s %(asctime)s %(name)s: %(message)s",
        force=True,
    )


def report_progress(message: str) -> None:
    """Write a line that the command line recognizes as progress of loading."""
    sys.stderr.write(f"lorax: {message}\n")
    sys.stderr.flush()


def report_engine_death(reason: str) -> None:
    """Write a line that makes whoever started the server end it; a server without an engine can only refuse."""
    sys.stderr.write(f"{ENGINE_DEAD_MARK}{reason}\n")
    sys.stderr.flush()


def model_exception(error: Exception) -> Any:
    """What `initialize` raises: one readable reason, which Triton repeats in its log and to whoever asks."""
    reason = str(error) or type(error).__name__
    if not isinstance(error, LoraxError | ValueError | RuntimeError | OSError):
        reason = f"{type(error).__name__}: {reason}"
    return pb_utils.TritonModelException(reason)


def complete_config(
    model_config: Any, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]
) -> Any:
    """Fill in the tensors of a model configuration that was written without them."""
    for spec in inputs:
        model_config.add_input(_described(spec) | {"optional": True})
    for spec in outputs:
        model_config.add_output(_described(spec))
    model_config.set_max_batch_size(0)
    return model_config


def _described(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "data_type": config_type(spec.datatype), "dims": list(spec.dims)}
