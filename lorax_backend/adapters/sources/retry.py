"""Trying again what may go well a moment later. Standard library only."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from lorax_backend.errors import AdapterDownloadError, AdapterError
from lorax_backend.types import AdapterRef

T = TypeVar("T")

_FIRST_WAIT_S = 0.5
_LONGEST_WAIT_S = 8.0


class OutOfTimeError(Exception):
    """A download did not end in its time; what has come is the beginning of the file all the same."""

    def __init__(self, seconds: float) -> None:
        super().__init__(seconds)
        self.seconds = seconds

    def told(self, ref: AdapterRef) -> AdapterDownloadError:
        """The error to give to the caller."""
        return AdapterDownloadError(
            f"{ref}: its download did not end within {self.seconds:g} s (adapter_load_timeout_s); the next one goes "
            "on where it stopped"
        )


@dataclass(frozen=True, slots=True)
class Retry:
    """Up to `attempts` tries with growing, jittered waits, none of which would end after `deadline_s` seconds."""

    attempts: int = 5
    deadline_s: float = 120.0
    sleep: Callable[[float], None] = field(default=time.sleep, repr=False)

    def call(
        self,
        work: Callable[[], T],
        started: float,
        is_transient: Callable[[Exception], bool],
        translate: Callable[[Exception], AdapterError],
        retry_after: Callable[[Exception], float | None] = lambda error: None,
    ) -> T:
        """What `work` returns. `started` is the `time.monotonic()` from which the deadline counts.

        Raises:
            AdapterError: what `translate` makes of the last failure.
        """
        wait, attempt = _FIRST_WAIT_S, 1
        while True:
            try:
                return work()
            except Exception as error:
                pause = retry_after(error)
                if pause is None:
                    pause = wait * random.uniform(0.5, 1.0)
                left = self.deadline_s - (time.monotonic() - started)
                if attempt >= self.attempts or pause > left or not is_transient(error):
                    raise translate(error) from None
            self.sleep(pause)
            wait, attempt = min(wait * 2, _LONGEST_WAIT_S), attempt + 1
