"""Finding a tritonserver: the one on PATH (NVIDIA's container), else the one packaged in the nvidia-pytriton
wheel.

Nothing is downloaded and nothing is written outside the folder given to `prepare`.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_STUB = "triton_python_backend_stub"


class ServerNotFoundError(RuntimeError):
    """No tritonserver that fits this interpreter; the message says how to get one."""


@dataclass(frozen=True, slots=True)
class Installation:
    """A tritonserver program. `wheel` is the packaged server's folder, None for a server found on PATH."""

    executable: Path
    wheel: Path | None = None

    def prepare(
        self, folder: Path, environ: Mapping[str, str] | None = None
    ) -> tuple[list[str], dict[str, str]]:
        """Arguments and environment to start the server with; links are made below `folder` where needed.

        The stub takes its Python from the first python3 on PATH, so this interpreter's folder comes first
        there.
        """
        env = dict(os.environ if environ is None else environ)
        env["PATH"] = os.pathsep.join(_without_empty([str(Path(sys.executable).parent), env.get("PATH", "")]))
        env.setdefault("PYTHONUNBUFFERED", "1")
        if self.wheel is None:
            return [], env
        backends = _link_python_backend(self.wheel, folder)
        libraries = [str(self.wheel.parent.parent / "nvidia_pytriton.libs"), *_python_library_folders()]
        env["LD_LIBRARY_PATH"] = os.pathsep.join(_without_empty([*libraries, env.get("LD_LIBRARY_PATH", "")]))
        return [f"--backend-directory={backends}"], env


def _without_empty(parts: list[str]) -> list[str]:
    return [part for part in parts if part]


def _python_library_folders() -> list[str]:
    """Folders that may hold this interpreter's libpython, which the stub is linked to."""
    folders = [sysconfig.get_config_var("LIBDIR") or "", str(Path(sys.base_prefix) / "lib")]
    name = sysconfig.get_config_var("INSTSONAME") or ""
    return [folder for folder in dict.fromkeys(folders) if folder and (Path(folder) / name).is_file()]


def _link_python_backend(wheel: Path, folder: Path) -> Path:
    """A private backend folder: links to the wheel's Python backend and to the stub of the running Python
    version."""
    backends = folder / "backends"
    target = backends / "python"
    target.mkdir(parents=True, exist_ok=True)
    links = {path.name: path for path in (wheel / "backends" / "python").iterdir() if path.is_file()}
    links[_STUB] = _stub(wheel)
    for name, source in links.items():
        link = target / name
        link.unlink(missing_ok=True)
        if name == _STUB and not os.access(source, os.X_OK):
            shutil.copy(source, link)
            link.chmod(0o755)
        else:
            link.symlink_to(source)
    return backends


def _stub(wheel: Path) -> Path:
    return wheel / "python_backend_stubs" / sysconfig.get_python_version() / _STUB


def _packaged() -> Installation | None:
    spec = importlib.util.find_spec("pytriton")
    if spec is None or not spec.submodule_search_locations:
        return None
    wheel = Path(next(iter(spec.submodule_search_locations))) / "tritonserver"
    executable = wheel / "bin" / "tritonserver"
    return Installation(executable, wheel) if executable.is_file() else None


def _check_packaged(wheel: Path) -> None:
    if not _stub(wheel).is_file():
        versions = sorted(path.name for path in (wheel / "python_backend_stubs").iterdir())
        raise ServerNotFoundError(
            f"the packaged tritonserver has no stub for Python {sysconfig.get_python_version()}; "
            f"use one of {', '.join(versions)}, or a tritonserver on PATH"
        )
    if int(importlib.metadata.version("numpy").split(".")[0]) >= 2:
        raise ServerNotFoundError(
            "the packaged tritonserver needs numpy 1.x: pip install 'numpy<2', or use a tritonserver on PATH"
        )


def find_tritonserver() -> Installation:
    """The tritonserver to start.

    Raises:
        ServerNotFoundError: there is none, or the packaged one does not fit this Python or numpy.
    """
    on_path = shutil.which("tritonserver")
    if on_path:
        return Installation(Path(on_path))
    packaged = _packaged()
    if packaged is None or packaged.wheel is None:
        raise ServerNotFoundError(
            "no tritonserver found on PATH or installed: pip install --no-deps nvidia-pytriton==0.7.0, "
            "or run inside NVIDIA's tritonserver container"
        )
    _check_packaged(packaged.wheel)
    return packaged
