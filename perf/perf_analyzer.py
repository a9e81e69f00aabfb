"""A runnable NVIDIA perf_analyzer: the one on PATH, else the one of its wheel, fetched once into the user's cache.

The wheel's binary needs glibc 2.38. On an older system (Debian 12, Ubuntu 22.04) it is started by the loader and the
libraries of a newer Debian, which are unpacked beside it and touch nothing else: no root, no container.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

VERSION = "2.60.0"
_GLIBC_NEEDED = (2, 38)
_DEBIAN = "trixie"
_LIBRARIES = ("libc6", "libstdc++6", "libgcc-s1", "libssl3t64", "zlib1g", "libzstd1")
_LIB_DIR = Path("usr/lib/x86_64-linux-gnu")


class PerfAnalyzerError(RuntimeError):
    """perf_analyzer cannot be had here; the message says why and what helps."""


def cache_folder() -> Path:
    """Where the binary and its libraries are kept."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base else Path.home() / ".cache") / "lorax-triton" / f"perf_analyzer-{VERSION}"


def find_perf_analyzer(given: Path | None = None) -> list[str]:
    """The command that starts perf_analyzer: `given`, a binary or a wheel of it, for machines without a network; else
    the one on PATH; else that of the wheel, fetched if need be.

    Raises:
        PerfAnalyzerError: it is not installed and cannot be fetched, or `given` does not start.
    """
    if given is not None and not given.is_file():
        raise PerfAnalyzerError(f"there is no file {given}; name a perf_analyzer binary or a wheel of it")
    on_path = shutil.which("perf_analyzer") if given is None else None
    if on_path and _works([on_path]):
        return [on_path]
    if platform.machine() != "x86_64":
        raise PerfAnalyzerError("the perf-analyzer wheel is for x86_64; put perf_analyzer on PATH")
    folder = cache_folder()
    binary = folder / "wheel" / "perf_analyzer" / "bin" / "perf_analyzer"
    if given is not None and given.suffix == ".whl":
        binary = _unpack_wheel(given, folder / "given") / "perf_analyzer" / "bin" / "perf_analyzer"
    elif given is not None:
        binary = given
    elif not binary.is_file():
        _fetch_wheel(folder / "wheel")
    command = [str(binary)]
    if _glibc() < _GLIBC_NEEDED:
        libraries = folder / _DEBIAN / _LIB_DIR
        if not (libraries / "ld-linux-x86-64.so.2").exists():
            _fetch_libraries(folder / _DEBIAN)
        command = [str(libraries / "ld-linux-x86-64.so.2"), "--library-path", str(libraries), str(binary)]
    if not _works(command):
        remedy = "give another" if given is not None else f"remove {folder} and try again"
        raise PerfAnalyzerError(f"{' '.join(command)} does not start; {remedy}")
    return command


def _works(command: list[str]) -> bool:
    try:
        return subprocess.run([*command, "--version"], capture_output=True, timeout=30).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def _glibc() -> tuple[int, ...]:
    return tuple(int(part) for part in platform.libc_ver()[1].split(".")[:2] if part.isdecimal()) or (0, 0)


def _run(command: list[str], what: str, cwd: Path | None = None) -> None:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    if done.returncode != 0:
        tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-6:])
        raise PerfAnalyzerError(f"{what} failed:\n{tail}")


def _fetch_wheel(dest: Path) -> None:
    # Plain `pip install` on an older glibc silently takes version 0.1.0, an empty placeholder.
    with tempfile.TemporaryDirectory() as folder:
        _run(
            [
                *(sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps"),
                *("--only-binary=:all:", "--platform", "manylinux_2_38_x86_64", "--dest", folder),
                f"perf-analyzer=={VERSION}",
            ],
            "downloading the perf-analyzer wheel",
        )
        (wheel,) = Path(folder).glob("*.whl")
        _unpack_wheel(wheel, dest)


def _unpack_wheel(wheel: Path, dest: Path) -> Path:
    """Unpack into `dest`, replacing what is there."""
    partial = dest.with_name(dest.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(partial)
        (partial / "perf_analyzer" / "bin" / "perf_analyzer").chmod(0o755)
    except (OSError, zipfile.BadZipFile) as error:
        raise PerfAnalyzerError(f"{wheel} is no wheel of perf_analyzer: {error}") from error
    shutil.rmtree(dest, ignore_errors=True)
    return partial.rename(dest)


def _fetch_libraries(dest: Path) -> None:
    if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
        needed = ".".join(map(str, _GLIBC_NEEDED))
        raise PerfAnalyzerError(
            f"perf_analyzer needs glibc {needed}; this system's is older and has no apt-get to fetch a newer one."
            " Run it on Ubuntu 24.04, Debian 13, or in Triton's SDK container"
        )
    partial = dest.with_name(dest.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        apt = _private_apt(Path(folder))
        _run(["apt-get", *apt, "update"], f"reading the package list of Debian {_DEBIAN}")
        _run(["apt-get", *apt, "download", *_LIBRARIES], "downloading newer C libraries", cwd=Path(folder))
        for package in sorted(Path(folder).glob("*.deb")):
            _run(["dpkg-deb", "--extract", str(package), str(partial)], f"unpacking {package.name}")
    partial.rename(dest)


def _private_apt(folder: Path) -> list[str]:
    """Options that point apt-get at a package list of its own below `folder`; the system's is not touched."""
    for name in ("lists/partial", "archives/partial"):
        (folder / name).mkdir(parents=True)
    (folder / "status").touch()
    (folder / "sources.list").write_text(f"deb {_mirror()} {_DEBIAN} main\n")
    options = {
        "Dir::Etc::sourcelist": folder / "sources.list",
        "Dir::Etc::sourceparts": "/dev/null",
        "Dir::State::lists": folder / "lists",
        "Dir::State::status": folder / "status",
        "Dir::Cache::archives": folder / "archives",
        "Dir::Cache::pkgcache": "",
        "Dir::Cache::srcpkgcache": "",
        "APT::Architecture": "amd64",
        # apt's own sandbox user cannot write into a private folder.
        "APT::Sandbox::User": "root",
    }
    return [part for name, value in options.items() for part in ("-o", f"{name}={value}")]


def _mirror() -> str:
    """The Debian mirror this system uses."""
    etc = Path("/etc/apt")
    for path in [etc / "sources.list", *sorted((etc / "sources.list.d").glob("*"))]:
        if path.is_file():
            match = re.search(r"https?://\S+/debian/?(?=\s)", path.read_text(errors="replace") + "\n")
            if match:
                return match[0]
    return "http://deb.debian.org/debian"


if __name__ == "__main__":
    print(" ".join(find_perf_analyzer()))
