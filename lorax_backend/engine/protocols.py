"""The seams of the engine: what the core needs from the model, the adapters and the clock.

`EngineCore` is given these; `engine.build` is the one place that makes the real ones. Tests give fakes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from lorax_backend.errors import LoraxError
from lorax_backend.scheduler.sequence import ScheduledBatch, StepResult
from lorax_backend.types import AdapterRef, EngineInfo, EngineRequest, EngineStats, TokenOutput

# Control commands that the adapter provider answers; the core passes on everything that begins with "adapter_".
ADAPTER_COMMANDS = (
    "adapter_preload",
    "adapter_pin",
    "adapter_unpin",
    "adapter_unload",
    "adapter_reload",
    "adapter_purge",
)


class StepHandle(Protocol):
    """A launched step."""

    def result(self) -> StepResult:
        """Wait for the step and return what it drew. Called once, in launch order."""
        ...


class ModelRunner(Protocol):
    """Owns weights, the KV cache tensors and the device. Only the engine thread calls it."""

    @property
    def num_blocks(self) -> int:
        """KV blocks the cache holds."""
        ...

    def launch(self, batch: ScheduledBatch) -> StepHandle:
        """Start one step; returns as soon as the device has its work. Reads, never writes, the sequences."""
        ...

    def check_device(self) -> None:
        """Called after a step that failed, when none is in flight: raises if no other could succeed, whatever it is."""
        ...

    def close(self) -> None:
        """Free the device memory."""
        ...


@dataclass(frozen=True, slots=True)
class AdapterFailure:
    """A request's adapter could not be had; the engine ends the request with `error`."""

    handle: int
    error: LoraxError


class AdapterProvider(Protocol):
    """Gets adapters near and onto the device. Every method is called from the engine thread and returns at once."""

    def resolve(self, ref: AdapterRef) -> AdapterRef:
        """The reference under which a request that comes now is scheduled: in its one spelling, and of the weights
        that are current. One that cannot be right comes back as it is."""
        ...

    def acquire(self, handle: int, ref: AdapterRef, api_token: str | None) -> None:
        """Note that request `handle` needs the adapter; start loading it if nobody has."""
        ...

    def release(self, handle: int) -> None:
        """The request is over (finished, failed or cancelled). Unknown handles are ignored."""
        ...

    def poll(self) -> list[AdapterFailure]:
        """Take in what the loader threads finished; the failures end requests."""
        ...

    def is_loaded(self, ref: AdapterRef) -> bool:
        """True if the weights are on the host or the device, so that `activate` may succeed."""
        ...

    def is_ready(self, handle: int, ref: AdapterRef) -> bool:
        """True if the weights are loaded and this very request may use them. Only then is it scheduled; asked again
        for as long as the request waits, so a right that was withdrawn holds it back."""
        ...

    def is_on_device(self, ref: AdapterRef) -> bool:
        """True if `activate` would need no copy."""
        ...

    def cache_key(self, ref: AdapterRef) -> str:
        """Identity of the loaded weights (source, id, resolved revision or content); only while `is_ready`."""
        ...

    def prefetch(self, refs: Sequence[AdapterRef]) -> None:
        """These adapters, soonest first, are loaded but not on the device and will be activated soon: copy those to
        the device for which there is room that nobody needs. Called before each step that leaves such behind."""
        ...

    def activate(self, ref: AdapterRef) -> int | None:
        """Make the adapter usable in the next launched step and count one user; its slot index, or None if there
        is no room now, because every slot or page is held by adapters in use. Evicts unused adapters, least
        recently used first."""
        ...

    def deactivate(self, ref: AdapterRef) -> None:
        """Undo one `activate`; the adapter stays on the device until its room is needed."""
        ...

    def fits(self, ref: AdapterRef) -> bool:
        """False if the loaded adapter could not be activated even on an empty device."""
        ...

    def set_wakeup(self, wakeup: Callable[[], None]) -> None:
        """`wakeup` is called, from any thread, when `poll` has something to return or an adapter became loaded."""
        ...

    def stats(self) -> dict[str, int]:
        """pages_total, pages_used, on_device, loading, loads, evictions."""
        ...

    def describe(self) -> list[dict[str, Any]]:
        """One dict an adapter known: id, source, revision, status, rank, bytes, users."""
        ...

    def control(self, command: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """Run one of ADAPTER_COMMANDS and return at once; what takes long goes on in the background.

        Raises:
            LoraxError: unknown command or arguments (ValidationError), or the adapter's own.
        """
        ...

    def check(self) -> None:
        """Verify the accounting of rooms and requests.

        Raises:
            RuntimeError: naming what is off; a defect of this program.
        """
        ...

    def close(self) -> None:
        """Stop the loader threads."""
        ...


class EngineEvents(Protocol):
    """What an engine tells its owner. Called from one thread of the engine's; must return quickly."""

    def on_outputs(self, outputs: list[TokenOutput]) -> None:
        """The tokens of one step, and ends of sequences."""
        ...

    def on_stats(self, stats: EngineStats) -> None:
        """Sent about once a second, and when the engine becomes idle."""
        ...

    def on_dead(self, reason: str) -> None:
        """The engine is gone; nothing will follow. Every live request must be ended by the owner."""
        ...


class EngineClient(Protocol):
    """An engine, in this process or another. All methods may be called from any thread.

    `InProcessEngine` (engine.loop) runs the core on a thread; `ProcessEngine` (engine.process) in a spawned process.
    """

    @property
    def info(self) -> EngineInfo: ...

    @property
    def alive(self) -> bool: ...

    def start(self, events: EngineEvents) -> None:
        """Start, and return when the model is ready to serve.

        Raises:
            RuntimeError: with a readable reason, if the model cannot be loaded.
        """
        ...

    def submit(self, request: EngineRequest) -> None:
        """Queue a request; its outputs arrive at `on_outputs`.

        Raises:
            EngineDeadError: if the engine is gone.
        """
        ...

    def cancel(self, handle: int) -> None:
        """End a request without further outputs and free what it holds. Unknown handles are ignored."""
        ...

    def control(self, command: str, arguments: dict[str, Any], timeout: float = 10.0) -> dict[str, Any]:
        """Run a control command on the engine thread: `stats`, `adapters`, `check` (raises if accounting is off),
        `reset_prefix_cache`, and ADAPTER_COMMANDS.

        Raises:
            ValidationError: unknown command or bad arguments.
            EngineDeadError: no answer in `timeout` seconds, or the engine is gone.
        """
        ...

    def stop(self, timeout: float = 5.0) -> None:
        """Stop the engine and free its memory; live requests get no further outputs."""
        ...
