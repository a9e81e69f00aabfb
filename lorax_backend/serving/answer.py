"""From the engine's tokens to what the caller sees: text, stop strings, token details, the final event.

Pure logic of one request, without threads: a sender calls it for the request it serves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lorax_backend.serving.stop import StopChecker
from lorax_backend.serving.tokenizer import TokenizerPool
from lorax_backend.types import FinishReason, GenerateRequest, GenerationEvent, Token, TokenOutput


@dataclass(frozen=True, slots=True)
class PreparedPrompt:
    """A prompt ready for the engine: its ids, its text (decoded only where needed), and the sampling seed used."""

    ids: list[int]
    text: str
    seed: int | None


class AnswerBuilder:
    """Builds the events of one answer.

    `add` takes the tokens that came since its last call. With `stream` every call may yield an event; without, only
    the last one, which holds everything. `stopped` is true once a stop string ended the answer before the engine did.
    """

    def __init__(self, request: GenerateRequest, tokenizer: TokenizerPool, prompt: PreparedPrompt) -> None:
        self._request = request
        self._tokenizer = tokenizer
        self._prompt = prompt
        self._detokenizer = tokenizer.detokenizer(prompt.ids)
        self._stop = StopChecker(request.stop, request.include_stop_str_in_output) if request.stop else None
        outputs = request.outputs
        self._token_texts = outputs.tokens or outputs.logprobs
        self._texts: list[str] = []
        self._fresh_text: list[str] = []
        self._fresh_tokens: list[Token] = []
        self._cumulative: float | None = None
        self._prompt_logprobs: tuple[float, ...] | None = None
        self.generated_tokens = 0
        self.cached_tokens = 0
        self.stopped = False

    @property
    def prompt_tokens(self) -> int:
        return len(self._prompt.ids)

    def add(self, outputs: Sequence[TokenOutput]) -> GenerationEvent | None:
        """The event to send now, or None if there is nothing worth a response yet."""
        reason = self._take(outputs)
        if reason is None:
            if not self._request.stream or not (self._fresh_text or self._wants_empty_pieces()):
                return None
            return self._event(None)
        return self._event(reason)

    def _wants_empty_pieces(self) -> bool:
        """Ids and log probabilities are worth a response even while their text is incomplete."""
        return bool(self._fresh_tokens) and (self._token_texts or self._request.outputs.token_ids)

    def _take(self, outputs: Sequence[TokenOutput]) -> FinishReason | None:
        if self._stop is None and not self._token_texts:
            return self._take_together(outputs)
        for output in outputs:
            reason = self._take_one(output)
            if reason is not None:
                return reason
        return None

    def _take_together(self, outputs: Sequence[TokenOutput]) -> FinishReason | None:
        """Decode all new ids at once: nobody needs to know which token brought which text."""
        ids: list[int] = []
        reason = None
        for output in outputs:
            self._count(output)
            reason = output.finish_reason
            if output.token_id is not None and reason is not FinishReason.EOS:
                ids.append(output.token_id)
            if reason is not None:
                break
        if ids:
            self._show(self._detokenizer.append(ids))
        if reason is not None:
            self._show(self._detokenizer.flush())
        return reason

    def _take_one(self, output: TokenOutput) -> FinishReason | None:
        token = self._count(output)
        reason = output.finish_reason
        piece = ""
        if token is not None and reason is not FinishReason.EOS:
            piece = self._detokenizer.append([token.id])
        if reason is not None:
            piece += self._detokenizer.flush()
        shown = piece
        if self._stop is not None and self.generated_tokens > self._request.sampling.min_new_tokens:
            shown = self._stop.feed(piece)
            if self._stop.matched is not None:
                self.stopped = reason is None
                reason = reason or FinishReason.STOP
            elif reason is not None:
                shown += self._stop.flush()
        if token is not None and self._token_texts:
            cut = self._stop is not None and self._stop.matched is not None and len(shown) < len(piece)
            token.text = self._text_of(token, shown if cut else piece)
        self._show(shown)
        return reason

    def _text_of(self, token: Token, piece: str) -> str:
        return self._tokenizer.token_text(token.id) if token.special else piece

    def _alternative_text(self, token_id: int) -> str:
        """What the token would add to the text so far, in the place of the one drawn."""
        if token_id in self._tokenizer.special_ids:
            return self._tokenizer.token_text(token_id)
        return self._detokenizer.peek(token_id)

    def _prefill(self) -> list[Token]:
        """The prompt's tokens; the first has no log probability, as nothing comes before it."""
        logprobs = [None, *(self._prompt_logprobs or [None] * (self.prompt_tokens - 1))]
        detokenizer = self._tokenizer.detokenizer()
        tokens = []
        for token_id, logprob in zip(self._prompt.ids, logprobs, strict=True):
            piece = detokenizer.append([token_id])
            token = Token(token_id, piece, logprob, token_id in self._tokenizer.special_ids)
            token.text = self._text_of(token, piece)
            if logprob is not None and math.isnan(logprob):  # its position was not computed
                token.logprob = None
            tokens.append(token)
        return tokens

    def _count(self, output: TokenOutput) -> Token | None:
        if output.cached_tokens is not None:
            self.cached_tokens = output.cached_tokens
        if output.prompt_logprobs is not None:
            self._prompt_logprobs = output.prompt_logprobs
        if output.token_id is None:
            return None
        self.generated_tokens += 1
        if output.logprob is not None:
            self._cumulative = (self._cumulative or 0.0) + output.logprob
        token = Token(output.token_id, "", output.logprob, output.token_id in self._tokenizer.special_ids)
        if output.top_logprobs is not None and self._token_texts:
            token.top_logprobs = tuple(
                (token_id, self._alternative_text(token_id), logprob)
                for token_id, logprob in output.top_logprobs
            )
        self._fresh_tokens.append(token)
        return token

    def _show(self, text: str) -> None:
        if text:
            self._fresh_text.append(text)

    def _event(self, reason: FinishReason | None) -> GenerationEvent:
        text = "".join(self._fresh_text)
        event = GenerationEvent(
            text=text,
            tokens=self._fresh_tokens,
            prompt_tokens=self.prompt_tokens,
            cached_tokens=self.cached_tokens,
            generated_tokens=self.generated_tokens,
            cumulative_logprob=self._cumulative,
        )
        self._texts.append(text)
        self._fresh_text = []
        self._fresh_tokens = []
        if reason is not None:
            whole = "".join(self._texts)
            event.generated_text = self._prompt.text + whole if self._request.return_full_text else whole
            event.finish_reason = reason
            event.seed = self._prompt.seed
            if self._request.sampling.prompt_logprobs:
                event.prefill = self._prefill()
            if not self._request.stream:
                event.text = event.generated_text
        return event
