"""The `lorax_tokenizer` model: text or messages to token ids, in as many processes as its configuration asks for."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np
import triton_python_backend_utils as pb_utils

from lorax_backend.errors import LoraxError
from lorax_backend.tensors import TOKENIZER_INPUTS, TOKENIZER_OUTPUTS
from lorax_backend.triton_io import decode_request, error_response
from lorax_backend.triton_setup import complete_config, model_exception, read_config, set_up_logging

if TYPE_CHECKING:
    from lorax_backend.serving.prompt_tokenizer import PromptTokenizer

_log = logging.getLogger(__name__)


class TritonPythonModel:
    """Tokenizes one request at a time, exactly as `lorax` itself does; what it cannot do so it refuses."""

    _tokenizer: PromptTokenizer

    @staticmethod
    def auto_complete_config(auto_complete_model_config: Any) -> Any:
        return complete_config(auto_complete_model_config, TOKENIZER_INPUTS, TOKENIZER_OUTPUTS)

    def initialize(self, args: dict[str, str]) -> None:
        try:
            config = read_config(args)
            set_up_logging(config)
            from lorax_backend.serving.local import open_prompt_tokenizer

            self._tokenizer = open_prompt_tokenizer(config)
        except Exception as error:
            _log.exception("the tokenizer cannot be loaded")
            raise model_exception(error) from None

    def execute(self, requests: list[Any]) -> list[Any]:
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        try:
            ids = self._tokenizer.encode(decode_request(request))
        except LoraxError as error:
            return error_response(error)
        except Exception as error:
            _log.exception("a prompt could not be tokenized")
            return error_response(LoraxError(f"the prompt could not be tokenized: {error}"))
        return pb_utils.InferenceResponse([pb_utils.Tensor("input_ids", np.array(ids, dtype=np.int32))])

    def finalize(self) -> None:
        self._tokenizer.close()
