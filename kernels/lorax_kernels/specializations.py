"""What a launch compiles, written down without launching, and compiled elsewhere.

Triton compiles a kernel at the first launch with arguments of new types, alignments or constants, one after the other.
Here launches are rehearsed on tensors of the device "meta", which have shapes, strides and alignments but no memory:
each is recorded as Triton's own description of a specialization, from which any process can compile it into Triton's
cache, where the real launch finds it. None of this needs a GPU or changes what a launch does: what is not recorded, or
recorded wrongly, is compiled at its launch as ever.

`pretend` makes a process take "meta" for a device of given properties, for good: it is for processes of their own.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import logging
import pkgutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.driver import driver

from lorax_kernels.device_facts import DeviceFacts

log = logging.getLogger(__name__)

_WARP = 32
_BY_DEVICE = {
    "device": (
        "lora_config",
        "attention_config",
        "node_config",
        "gemm_config",
        "prefill_config",
        "prefill_rows",
    ),
    "index": ("num_sms", "_num_sms"),
}  # functions of a device's index by their parameter's name


@dataclass(frozen=True, slots=True)
class Specialization:
    """One kernel to compile: `data` is Triton's JSON description. Kernels of equal `signature` share a launcher."""

    module: str
    name: str
    data: str
    signature: str


@dataclass(frozen=True, slots=True)
class Compiled:
    """A kernel in Triton's cache, under the key `hash`; `hit` if it was there already."""

    name: str
    hash: str
    hit: bool


class _Driver:
    """As much of a Triton driver as compiling needs."""

    def __init__(self, facts: DeviceFacts) -> None:
        major, minor = facts.capability
        self._target = GPUTarget("cuda", major * 10 + minor, _WARP)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def pretend(facts: DeviceFacts, *modules: str) -> None:
    """Have this process take tensors on "meta" for tensors on a device of these properties. Nothing can be launched
    any more. `modules` are those outside this package that ask for configurations.

    Raises:
        AttributeError, ImportError: this Triton is laid out differently.
    """
    driver.set_active(_Driver(facts))
    stream = SimpleNamespace(wait_stream=lambda other: None)
    properties = SimpleNamespace(multi_processor_count=facts.multiprocessors)
    for name, replacement in {
        "get_device_capability": lambda device=None: facts.capability,
        "get_device_properties": lambda device=None: properties,
        "current_stream": lambda device=None: stream,
        "Stream": lambda device=None: stream,
        "stream": lambda stream: contextlib.nullcontext(),
    }.items():
        setattr(torch.cuda, name, replacement)
    dispatch = importlib.import_module("lorax_kernels.dispatch")
    dispatch._uses_triton = lambda tensor: True  # type: ignore[attr-defined]
    package = importlib.import_module("lorax_kernels")
    ours = [f"lorax_kernels.{found.name}" for found in pkgutil.iter_modules(package.__path__)]
    for module in (*ours, *modules):
        importlib.import_module(module)
        for parameter, names in _BY_DEVICE.items():
            for name in names:
                found = getattr(sys.modules[module], name, None)
                if found is not None:
                    setattr(sys.modules[module], name, _on_first_device(found, parameter))


def _on_first_device(function: Callable[..., Any], parameter: str) -> Callable[..., Any]:
    """`function`, given the device's index 0 where it is given None, which is all that "meta" has."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        if bound.arguments.get(parameter) is None:
            bound.arguments[parameter] = 0
        return function(*bound.args, **bound.kwargs)

    return call


@contextlib.contextmanager
def recorded() -> Iterator[dict[Specialization, None]]:
    """The specializations that are launched inside, in order, none of which runs; a process that `pretend`s is meant.
    What the functions around the kernels return has the right shapes and no contents."""
    found: dict[Specialization, None] = {}

    def hook(*, fn: Any, compile: dict[str, Any], **kwargs: Any) -> bool:
        signature = repr(tuple(compile["signature"].values()))
        found[Specialization(fn.module, fn.name, compile["specialization_data"], signature)] = None
        return True  # do not compile, and so do not launch

    before = triton.knobs.runtime.jit_cache_hook
    triton.knobs.runtime.jit_cache_hook = hook
    try:
        yield found
    finally:
        triton.knobs.runtime.jit_cache_hook = before


def compile_kernel(wanted: Specialization, launcher: bool = False) -> Compiled:
    """Compile it into Triton's cache, unless it is there; with `launcher` also what launches kernels of its signature,
    where this Triton compiles such."""
    kernel = getattr(importlib.import_module(wanted.module), wanted.name)
    hits: list[bool] = []
    before = triton.knobs.compilation.listener
    triton.knobs.compilation.listener = lambda *, cache_hit, **kwargs: hits.append(cache_hit)
    try:
        made = kernel.preload(wanted.data)
    finally:
        triton.knobs.compilation.listener = before
    if launcher:
        compile_launcher(made)
    return Compiled(wanted.name, made.hash, all(hits))


def compile_launcher(kernel: Any) -> None:
    """Before 3.7 Triton has the C compiler make a module for every signature, at its first launch. Here nothing but
    time depends on it."""
    nvidia = importlib.import_module("triton.backends.nvidia.driver")
    if not hasattr(nvidia, "make_launcher"):
        return
    try:
        nvidia.CudaLauncher(kernel.src, kernel.metadata)
    except Exception as error:  # no C compiler, no libcuda: the launch will say so
        log.debug("no launcher for %s: %s", kernel.name, error)


def compile_driver() -> None:
    """The module that Triton has the C compiler make before the first launch of all."""
    nvidia = importlib.import_module("triton.backends.nvidia.driver")
    try:
        nvidia.CudaUtils()
    except Exception as error:
        log.debug("no driver module: %s", error)


def compiler_key() -> Callable[[], object]:
    """What works out Triton's hash of its own files, a part of every key of its cache, which is kept from then on. The
    call takes half a second and more, most of it without Python's lock; it imports nothing, so any thread may make
    it."""
    from triton.runtime.cache import triton_key

    for package in (triton.compiler, triton.backends, triton.language):
        for _ in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            pass  # imports the packages among them, as the call will
    return triton_key


def prepare() -> None:
    """Work out what the keys of all kernels have in common, before this process is forked."""
    compiler_key()()
    backend = make_backend(driver.active.get_current_target())
    backend.hash()  # asks the assembler for its version
    backend.parse_options({}).hash()  # reads a library


def effort(wanted: Specialization) -> int:
    """A guess at how long it takes to compile: the length of the source."""
    return len(getattr(importlib.import_module(wanted.module), wanted.name).src)


def is_cached(hash: str, name: str) -> bool:
    """Whether Triton's cache still has the kernel `name` under this key."""
    from triton.runtime.cache import get_cache_manager

    file = f"{name[:150]}.json"
    return file in (get_cache_manager(hash).get_group(file) or {})
