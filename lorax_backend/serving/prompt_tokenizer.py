"""Prompts to token ids as the service makes them, for the tokenizer model, which stands before the engine in a process
of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from lorax_backend.config import ServerConfig
from lorax_backend.errors import UnsupportedError
from lorax_backend.serving.adapter_fields import adapter_ref
from lorax_backend.serving.adapter_templates import AdapterTemplates, FileSource
from lorax_backend.serving.aliases import AliasTable
from lorax_backend.serving.given import RawRequest
from lorax_backend.serving.parameters import parse_prompt
from lorax_backend.serving.prompt import encode_prompt
from lorax_backend.serving.tokenizer import TokenizerPool
from lorax_backend.types import GenerateRequest

_LOCAL = "local"


class PromptTokenizer:
    """Tokenizes one request at a time, on the caller's thread.

    Args:
        sources: makes the sources of adapters, by name; called on first use. Only `local` is asked: others would have
            all who come after wait for a download.

    Raises:
        ValidationError: the option `adapter_aliases` cannot be read.
    """

    def __init__(
        self,
        config: ServerConfig,
        tokenizer: TokenizerPool,
        sources: Callable[[], Mapping[str, FileSource]],
    ) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._templates = AdapterTemplates(sources, tokenizer.special_tokens)
        # Those that were set while the server runs are known to the service alone.
        self._aliases = AliasTable(lambda name, source, revision: adapter_ref(name, source, revision, config))
        self._aliases.load(config.adapter_aliases)

    def encode(self, raw: RawRequest) -> list[int]:
        """Token ids of a request's prompt; a chat is rendered with the adapter's own chat template, if it has one.

        Raises:
            UnsupportedError: a chat for an adapter whose files are not on this machine's own disk.
            LoraxError: the prompt is refused; see `encode_prompt` and `AdapterTemplates.get`.
        """
        request = parse_prompt(raw, self._config)
        template = None
        ref = None if request.messages is None else self._aliases.resolve(request)
        if ref is not None:
            if ref.source != _LOCAL:
                raise UnsupportedError(_refusal(request))
            self._templates.forget()  # the folder may hold another adapter than it did; looking costs a millisecond
            template = self._templates.get(ref, request.api_token)
        return encode_prompt(request, self._tokenizer, template)[0]

    def close(self) -> None:
        """End the processes that render templates."""
        self._templates.close()


def _refusal(request: GenerateRequest) -> str:
    return (
        f"messages: {request.adapter} may have a chat template of its own, and the tokenizer of the ensemble looks for "
        "one only in local adapters; send the request to the model lorax, which looks everywhere, or send text_input"
    )
