"""Client for a lorax-triton server: text generation with any LoRA adapter, streamed over Triton's gRPC.

    from lorax_triton import Client

    with Client("localhost:8001") as client:
        for response in client.generate_stream("Why is the sky blue?", adapter_id="some/adapter"):
            print(response.token.text, end="")

`Client` and `AsyncClient` have the calls, arguments, types and exceptions of the LoRAX client. `testing` has
transports without a network. `OpenAI` and `AsyncOpenAI` are the `openai` package's clients over the same gRPC. The
environment variable LORAX_DEBUG_MODE logs what goes over the wire, without its text.
"""

import logging
import os
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from lorax_triton._channel import Tls
from lorax_triton._stream import AsyncTokenStream, TokenStream
from lorax_triton._transport import (
    AsyncResponseStream,
    AsyncTransport,
    InferRequest,
    InferResponse,
    ResponseStream,
    Tensor,
    Transport,
)
from lorax_triton.adapters import Adapters, AsyncAdapters
from lorax_triton.aio import AsyncClient
from lorax_triton.client import Client
from lorax_triton.errors import (
    AdapterDownloadError,
    AdapterError,
    AdapterIncompatibleError,
    AdapterNotFoundError,
    AdapterTooLargeError,
    AdapterUnauthorizedError,
    BadRequestError,
    EngineDeadError,
    GenerationError,
    IncompleteGenerationError,
    LoraxError,
    NotFoundError,
    NotSupportedError,
    OverloadedError,
    RateLimitExceededError,
    RequestCancelledError,
    RequestTimeoutError,
    ServerConnectionError,
    ShardNotReadyError,
    ShardTimeoutError,
    ShuttingDownError,
    TemplateError,
    UnauthorizedError,
    UnknownError,
    UnprocessableEntityError,
    UnsupportedError,
    ValidationError,
    parse_error,
)
from lorax_triton.types import (
    AlternativeToken,
    BatchRequest,
    BestOfSequence,
    ClassifyResponse,
    DeployedModel,
    Details,
    EmbedResponse,
    FinishReason,
    InputToken,
    MergedAdapters,
    Parameters,
    Request,
    Response,
    ResponseFormat,
    ResponseFormatType,
    StreamDetails,
    StreamResponse,
    Token,
)

try:
    __version__ = version("lorax-triton")
except PackageNotFoundError:  # imported out of a folder that was never installed
    __version__ = "unknown"

if TYPE_CHECKING:
    from lorax_triton.openai_shim import AsyncOpenAI as AsyncOpenAI
    from lorax_triton.openai_shim import OpenAI as OpenAI

_logger = logging.getLogger("lorax_triton")
_logger.addHandler(logging.NullHandler())
if os.environ.get("LORAX_DEBUG_MODE"):
    _logger.addHandler(logging.StreamHandler())
    _logger.setLevel(logging.DEBUG)

__all__ = [
    "AdapterDownloadError",
    "AdapterError",
    "AdapterIncompatibleError",
    "AdapterNotFoundError",
    "AdapterTooLargeError",
    "AdapterUnauthorizedError",
    "Adapters",
    "AlternativeToken",
    "AsyncAdapters",
    "AsyncClient",
    "AsyncResponseStream",
    "AsyncTokenStream",
    "AsyncTransport",
    "BadRequestError",
    "BatchRequest",
    "BestOfSequence",
    "ClassifyResponse",
    "Client",
    "DeployedModel",
    "Details",
    "EmbedResponse",
    "EngineDeadError",
    "FinishReason",
    "GenerationError",
    "IncompleteGenerationError",
    "InferRequest",
    "InferResponse",
    "InputToken",
    "LoraxError",
    "MergedAdapters",
    "NotFoundError",
    "NotSupportedError",
    "OverloadedError",
    "Parameters",
    "RateLimitExceededError",
    "Request",
    "RequestCancelledError",
    "RequestTimeoutError",
    "Response",
    "ResponseFormat",
    "ResponseFormatType",
    "ResponseStream",
    "ServerConnectionError",
    "ShardNotReadyError",
    "ShardTimeoutError",
    "ShuttingDownError",
    "StreamDetails",
    "StreamResponse",
    "TemplateError",
    "Tensor",
    "Tls",
    "Token",
    "TokenStream",
    "Transport",
    "UnauthorizedError",
    "UnknownError",
    "UnprocessableEntityError",
    "UnsupportedError",
    "ValidationError",
    "__version__",
    "parse_error",
]


def __getattr__(name: str) -> Any:
    """`OpenAI` and `AsyncOpenAI`, which import the `openai` package, on their first use."""
    if name not in ("OpenAI", "AsyncOpenAI"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from lorax_triton import openai_shim
    except ModuleNotFoundError as error:
        if error.name != "openai":
            raise
        raise ImportError(f"{name} needs the openai package: pip install 'lorax-triton[openai]'") from error
    return getattr(openai_shim, name)
