"""Records when an engine's steps end, in whatever process the engine runs.

An engine alone and the engine of a tritonserver are measured by the same few lines, inside the engine's process. A
step that gave tokens writes 12 bytes: the time on the system's monotonic clock (float64, seconds) and the number of
outputs (uint32). They are written before the outputs leave, so whoever has seen a token finds its step in the file.
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path

from lorax_backend.config import ServerConfig
from lorax_backend.engine import build
from lorax_backend.engine.client import BuiltEngine
from lorax_backend.engine.core import EngineCore
from lorax_backend.types import TokenOutput

_ENTRY = struct.Struct("<dI")
# Bound when this module is first imported, thus before `install` puts another in its place.
_build_plain = build.build_engine


def build_recorded(
    record: Path, config: ServerConfig, model_path: Path, progress: Callable[[str], None]
) -> BuiltEngine:
    """`engine.build.build_engine`, with the ends of the core's steps appended to the file `record`."""
    built = _build_plain(config, model_path, progress)
    watch(built.core, record)
    return built


def watch(core: EngineCore, record: Path) -> None:
    """Append every step of `core` that gives outputs to the file `record`, from now on."""
    descriptor = os.open(record, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    plain = core.step

    def step() -> list[TokenOutput]:
        outputs = plain()
        if outputs:
            os.write(descriptor, _ENTRY.pack(time.monotonic(), len(outputs)))
        return outputs

    core.step = step  # type: ignore[method-assign]


def install(record: str) -> None:
    """Let engines that this process makes, or spawns, be recorded."""
    build.build_engine = partial(build_recorded, Path(record))  # type: ignore[assignment]


def model_file(record: Path) -> str:
    """The text of a Triton model's model.py whose engine is recorded."""
    return (
        f"import sys\n\nsys.path.insert(0, {str(Path(__file__).resolve().parent)!r})\nimport step_recorder\n\n"
        f"step_recorder.install({str(record)!r})\n"
        "from lorax_backend.triton_model import TritonPythonModel as TritonPythonModel\n"
    )


def read_steps(record: Path) -> list[tuple[float, int]]:
    """(time, outputs) of every step in the file, in order; none if there is no file."""
    if not record.exists():
        return []
    data = record.read_bytes()
    return list(_ENTRY.iter_unpack(data[: len(data) // _ENTRY.size * _ENTRY.size]))


def step_times_ms(record: Path, window: tuple[float, float]) -> list[float]:
    """Milliseconds between the ends of consecutive steps that both lie in the window."""
    ends = [when for when, _ in read_steps(record) if window[0] <= when <= window[1]]
    return [1e3 * (b - a) for a, b in pairwise(ends)]
