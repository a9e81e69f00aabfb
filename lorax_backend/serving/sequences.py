"""Several sequences for one request: n answers, each with its index, or the best of several."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lorax_backend.serving.delivery import LiveRequest, ResponseChannel
from lorax_backend.types import GenerateRequest, GenerationEvent


def mean_logprob(event: GenerationEvent) -> float:
    """The mean log probability of an answer's tokens, by which answers are compared; -inf if it is not known."""
    if event.cumulative_logprob is None or not event.generated_tokens:
        return float("-inf")
    return event.cumulative_logprob / event.generated_tokens


@dataclass(slots=True)
class MemberChannel:
    """The way of one sequence's events into its group."""

    group: SequenceGroup
    index: int

    def send(self, event: GenerationEvent, request: GenerateRequest | None) -> None:
        self.group.take(self.index, event, request)

    def is_cancelled(self) -> bool:
        return not self.group.over() and self.group.channel.is_cancelled()


class SequenceGroup:
    """Joins the events of `total` sequences into the answer to one request.

    With as many sequences as answers wanted, every event is passed on with its sequence's index. With more, the answers
    are kept until the last is there, and the likeliest are sent. The first error ends the request and cancels the rest.
    Used from one thread, the sender that all members share; only `members` grows in another before they run.

    Args:
        request: says how many are wanted (`n`) and drawn (`best_of`).
        channel: the caller's.
        cancel: ends a member that is no longer wanted.
    """

    def __init__(
        self, request: GenerateRequest, channel: ResponseChannel, cancel: Callable[[LiveRequest], None]
    ) -> None:
        self.channel = channel
        self.total = max(request.n, request.best_of)
        self.members: list[LiveRequest] = []
        self._ended = False
        self.generated_tokens = 0
        self._wanted = request.n
        self._cancel = cancel
        self._closer: int | None = None
        self._finals: dict[int, GenerationEvent] = {}

    def member(self, index: int) -> MemberChannel:
        return MemberChannel(self, index)

    def over(self) -> bool:
        """True once the caller has got the last event, or an error."""
        return self._ended

    def closed_by(self, live: LiveRequest) -> bool:
        """True for the one member whose end was the end of the request."""
        return self._closer is not None and self.members[self._closer] is live

    def take(self, index: int, event: GenerationEvent, request: GenerateRequest | None) -> None:
        """Pass on, or keep, one event of sequence `index`; after the end of the request they are dropped."""
        if self._ended:
            return
        if event.error is not None:
            self._fail(index, event, request)
            return
        if event.finish_reason is not None:
            self._finals[index] = event
            self.generated_tokens += event.generated_tokens
        last = len(self._finals) == self.total
        if self.total == self._wanted:
            event.index = index
            event.more = event.finish_reason is not None and not last
            self.channel.send(event, request)
        elif last:
            self._send_best(event, request)
        if last:
            self._ended = True
            self._closer = index

    def _send_best(self, last: GenerationEvent, request: GenerateRequest | None) -> None:
        order = sorted(self._finals, key=lambda index: (-mean_logprob(self._finals[index]), index))
        ranked = [self._finals[index] for index in order]
        chosen, others = ranked[: self._wanted], ranked[self._wanted :]
        chosen[0].best_of_sequences = others
        for rank, event in enumerate(chosen):
            event.index, event.more = rank, rank + 1 < len(chosen)
            event.timings = last.timings
            self.channel.send(event, request)

    def _fail(self, index: int, event: GenerationEvent, request: GenerateRequest | None) -> None:
        self._ended = True
        self._closer = index
        event.index = index
        try:
            self.channel.send(event, request)
        finally:
            for number, member in enumerate(list(self.members)):
                if number != index:
                    self._cancel(member)
