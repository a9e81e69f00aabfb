"""From a PEFT folder to a `HostAdapter`: every tensor matched with a layer of the base, checked, and put in pages.

Nothing here reaches the network. All problems of an adapter are found and reported together, because
each one fixed costs its author an upload.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from lorax_backend.adapters.host_adapter import HostAdapter
from lorax_backend.adapters.peft_config import PeftConfig, read_peft_config
from lorax_backend.adapters.tensor_names import LORA_A, LORA_B, TensorName, parse_tensor_name
from lorax_backend.adapters.weight_files import CONFIG_NAME, choose_weight_names
from lorax_backend.adapters.weight_reader import (
    StoredTensor,
    WeightFileError,
    file_format,
    read_header,
    read_tensors,
)
from lorax_backend.errors import AdapterIncompatibleError, AdapterNotFoundError, AdapterTooLargeError
from lorax_backend.model.lora import LoraTarget
from lorax_kernels.layout import PAGE_RANK, PageLayout, pages_for_rank

_DTYPES = ("F32", "F16", "BF16", "F64")
_MAX_LISTED = 3  # tensors with the same problem named before the rest is only counted
# One adapter is laid out at a time, turn by turn. Every call of torch gives the interpreter away and wants it back:
# beside one thread that does so the step's thread hardly notices, beside several it waits for tens of milliseconds.
_LAYING_OUT = threading.Lock()
_MODULES_A_TURN = 16


_Stamp = tuple[int, int, int, int]  # inode, bytes, times of modification and of change in ns


@dataclass(slots=True)
class _Module:
    """A and B of one layer of the base, as far as they were found. `raw` is its name in the adapter's own words."""

    path: str
    raw: str
    target: LoraTarget
    a: StoredTensor | None = None
    b: StoredTensor | None = None
    rank: int = 0
    scaling: float = 0.0


@dataclass(slots=True)
class _Problems:
    """What is wrong with an adapter. A mistake made in 200 tensors is told once, with the first of their names."""

    general: list[str] = field(default_factory=list)
    tensors: dict[str, list[str]] = field(default_factory=dict)
    too_large: list[str] = field(default_factory=list)

    def add(self, text: str) -> None:
        self.general.append(text)

    def add_tensor(self, tensor: StoredTensor, text: str) -> None:
        self.tensors.setdefault(text, []).append(tensor.name)

    def raise_if_any(self, folder: Path) -> None:
        kind = AdapterIncompatibleError if self.general or self.tensors else AdapterTooLargeError
        texts = self.too_large + self.general
        for text, names in self.tensors.items():
            more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
            texts.append(f"{', '.join(names[:_MAX_LISTED])}{more}: {text}")
        if texts:
            raise kind(f"adapter {folder.name} cannot be used with this base model: " + "; ".join(texts))


@dataclass(frozen=True, slots=True)
class AdapterPlan:
    """An adapter checked by its configuration and the headers of its files, not read yet.

    `num_pages` and `nbytes` are what the loaded adapter will take; `stamps` tell whether a file is still the same.
    """

    folder: Path
    rank: int
    layout: PageLayout
    dtype: torch.dtype
    modules: Mapping[str, _Module]
    stamps: Mapping[Path, _Stamp | None]

    @property
    def num_pages(self) -> int:
        return pages_for_rank(self.rank)

    @property
    def nbytes(self) -> int:
        return self.num_pages * self.layout.page_size * self.dtype.itemsize

    def load(self, pages: torch.Tensor | None = None) -> HostAdapter:
        """Read the weights into `pages` [num_pages, layout.page_size], or into new ones.

        Raises:
            AdapterIncompatibleError: NaN or infinity, or files that changed since they were inspected.
        """
        problems = _Problems()
        if pages is None:
            pages = torch.empty(self.num_pages, self.layout.page_size, dtype=self.dtype)
        _fill_pages(self, pages, problems)
        problems.raise_if_any(self.folder)
        sites = frozenset(module.target.site for module in self.modules.values())
        return HostAdapter(pages=pages, rank=self.rank, sites=sites, modules=tuple(sorted(self.modules)))


def load_adapter(
    folder: Path, targets: Mapping[str, LoraTarget], layout: PageLayout, dtype: torch.dtype, max_rank: int
) -> HostAdapter:
    """`inspect_adapter`, then `AdapterPlan.load`; raises as they do."""
    return inspect_adapter(folder, targets, layout, dtype, max_rank).load()


def inspect_adapter(
    folder: Path,
    targets: Mapping[str, LoraTarget],
    layout: PageLayout,
    dtype: torch.dtype,
    max_rank: int,
    allow_pickle: bool = False,
) -> AdapterPlan:
    """Check the PEFT adapter in `folder` against the base model, reading headers only.

    `targets` maps module paths of the base model to their places in `layout`. The weights will be in `dtype`, with
    the scaling (alpha / r, or alpha / sqrt(r)) folded into B in float32 before the cast. `allow_pickle` lets
    adapter_model.bin be read where there are no safetensors.

    Raises:
        AdapterNotFoundError: the folder holds no adapter_config.json or no weights.
        AdapterIncompatibleError: naming everything that does not fit the base or is not supported.
        AdapterTooLargeError: the only problem is a rank above `max_rank`.
    """
    problems = _Problems()
    try:
        config, config_problems = read_peft_config(folder)
        names = [entry.name for entry in folder.iterdir() if entry.is_file()]
        weights = choose_weight_names(names, allow_pickle)
    except (FileNotFoundError, NotADirectoryError):
        raise AdapterNotFoundError(f"{folder} holds no {CONFIG_NAME}, so it is no PEFT adapter") from None
    except OSError as error:
        raise AdapterNotFoundError(f"adapter folder {folder} cannot be read: {error.strerror}") from None
    for problem in config_problems:
        problems.add(problem)
    stamps = {folder / name: _stamp(folder / name) for name in weights}
    stored = [tensor for file in stamps for tensor in _read_header(file, problems)]
    modules = _match_modules(stored, targets, problems)
    for module in modules.values():
        _check_shapes(module, problems)
    if config is not None:
        _check_against_config(modules, config, max_rank, problems)
    problems.raise_if_any(folder)
    if not modules:
        raise AdapterIncompatibleError(f"adapter {folder.name} holds no LoRA weights")
    rank = max(module.rank for module in modules.values())
    return AdapterPlan(folder, rank, layout, dtype, modules, stamps)


def _read_header(file: Path, problems: _Problems) -> list[StoredTensor]:
    try:
        return read_header(file)
    except WeightFileError as error:
        problems.add(
            f"{file.name} is damaged, truncated or not {file_format(file)} ({error}); save or download it again"
        )
        return []


def _match_modules(
    stored: Iterable[StoredTensor], targets: Mapping[str, LoraTarget], problems: _Problems
) -> dict[str, _Module]:
    modules: dict[str, _Module] = {}
    for tensor in stored:
        name = parse_tensor_name(tensor.name, targets)
        if name.problem:
            problems.add_tensor(tensor, name.problem)
        elif tensor.dtype not in _DTYPES:
            problems.add_tensor(tensor, f"dtype {tensor.dtype} is not one of {', '.join(_DTYPES)}")
        else:
            _place(tensor, name, modules, targets, problems)
    return modules


def _place(
    tensor: StoredTensor,
    name: TensorName,
    modules: dict[str, _Module],
    targets: Mapping[str, LoraTarget],
    problems: _Problems,
) -> None:
    module = modules.setdefault(name.module, _Module(name.module, name.raw_module, targets[name.module]))
    taken = module.a if name.part == LORA_A else module.b
    if taken is not None:
        problems.add_tensor(tensor, f"the same {name.part} as {taken.name}")
    elif name.part == LORA_A:
        module.a = tensor
    else:
        module.b = tensor


def _check_shapes(module: _Module, problems: _Problems) -> None:
    a, b, target = module.a, module.b, module.target
    for tensor, partner, missing in ((a, b, LORA_B), (b, a, LORA_A)):
        if tensor is not None and partner is None:
            problems.add_tensor(tensor, f"there is no {missing} beside it")
    if a is not None and (len(a.shape) != 2 or a.shape[1] != target.in_features or a.shape[0] == 0):
        problems.add_tensor(
            a, f"the base model needs shape [rank, {target.in_features}], found {list(a.shape)}"
        )
    elif b is not None and (len(b.shape) != 2 or b.shape[0] != target.out_features):
        problems.add_tensor(
            b, f"the base model needs shape [{target.out_features}, rank], found {list(b.shape)}"
        )
    elif a is not None and b is not None and a.shape[0] != b.shape[1]:
        problems.add_tensor(
            b, f"its rank is {b.shape[1]}, but that of the {LORA_A} beside it is {a.shape[0]}"
        )
    elif a is not None and b is not None:
        module.rank = a.shape[0]


def _check_against_config(
    modules: Mapping[str, _Module], config: PeftConfig, max_rank: int, problems: _Problems
) -> None:
    largest = max([module.rank for module in modules.values()], default=config.rank)
    if largest > max_rank:
        problems.too_large.append(f"rank {largest} is above the server's max_lora_rank {max_rank}")
    for module in modules.values():
        if module.a is None or module.rank == 0:
            continue  # reported by _check_shapes
        try:
            if not any(config.selects(name) for name in (module.raw, module.path)):
                reason = "is not chosen by target_modules, exclude_modules and layers_to_transform"
                problems.add_tensor(module.a, f"its module {reason} of {CONFIG_NAME}")
            declared = config.rank_for(module.raw)
            if declared != module.rank:
                found = f"its rank is {module.rank}, but r and rank_pattern of {CONFIG_NAME} say {declared}"
                problems.add_tensor(module.a, found)
            module.scaling = config.scaling_for(module.raw, module.rank)
        except ValueError as error:
            problems.add(str(error))
            return


def _fill_pages(plan: AdapterPlan, pages: torch.Tensor, problems: _Problems) -> None:
    """Write every element of `pages`: weights where there are some, zeros elsewhere."""
    weights = list(_read_weights(plan.modules, plan.stamps, problems))
    if problems.general:
        return
    for site in plan.layout.sites:
        _clear_unless_filled(plan, pages, site)
    for begin in range(0, len(weights), _MODULES_A_TURN):
        with _LAYING_OUT:
            for module, a, b in weights[begin : begin + _MODULES_A_TURN]:
                _fill_module(plan, pages, module, a, b)
    if _is_finite(pages):  # one pass over all; who is to blame is looked for where there is somebody
        return
    for module, _, _ in weights:
        for part, view in zip((module.a, module.b), _places(plan, pages, module), strict=True):
            if part is not None and not _is_finite(view):
                problems.add_tensor(
                    part, f"holds NaN or infinity as {str(plan.dtype).removeprefix('torch.')}"
                )


def _clear_unless_filled(plan: AdapterPlan, pages: torch.Tensor, site: str) -> None:
    """Zero a site's share of the pages, unless its modules will write all of it."""
    ranks = [module.rank for module in plan.modules.values() if module.target.site == site]
    slices = plan.layout.sites[site].out_slices
    if len(ranks) == len(slices) and all(rank == PAGE_RANK * plan.num_pages for rank in ranks):
        return
    plan.layout.a_view(pages, site).zero_()
    plan.layout.b_view(pages, site).zero_()


def _places(plan: AdapterPlan, pages: torch.Tensor, module: _Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Where a module's A [pages, 8, in] and B [pages, 8, out] go."""
    target, slices = module.target, plan.layout.sites[module.target.site].out_slices
    offset = sum(slices[: target.slice])
    used = pages[: pages_for_rank(module.rank)]
    return (
        plan.layout.a_view(used, target.site)[:, target.slice],
        plan.layout.b_view(used, target.site)[:, :, offset : offset + target.out_features],
    )


def _fill_module(
    plan: AdapterPlan, pages: torch.Tensor, module: _Module, a: torch.Tensor, b: torch.Tensor
) -> None:
    """Put one module's A and B in their place."""
    a_pages, b_pages = _places(plan, pages, module)
    whole, rest = divmod(module.rank, PAGE_RANK)
    if whole:
        last = whole * PAGE_RANK
        a_pages[:whole] = a[:last].view(whole, PAGE_RANK, -1)
        _scaled(
            b[:, :last].unflatten(1, (whole, PAGE_RANK)).permute(1, 2, 0), module.scaling, b_pages[:whole]
        )
    if rest:
        a_pages[whole, :rest] = a[-rest:]
        _scaled(b[:, -rest:].t(), module.scaling, b_pages[whole, :rest])


def _scaled(b: torch.Tensor, scaling: float, out: torch.Tensor) -> None:
    """out = b * scaling, multiplied in float32 and rounded once, as torch does for all narrower types by itself."""
    if b.dtype == out.dtype:
        torch.mul(b, scaling, out=out)
    else:
        out.copy_(b.to(torch.float32).mul_(scaling))


def _read_weights(
    modules: Mapping[str, _Module], stamps: Mapping[Path, _Stamp | None], problems: _Problems
) -> Iterator[tuple[_Module, torch.Tensor, torch.Tensor]]:
    """A and B of every module."""
    pairs = [(module, module.a, module.b) for module in modules.values()]
    files = {tensor.file for _, a, b in pairs for tensor in (a, b) if tensor is not None}
    loaded: dict[Path, dict[str, torch.Tensor]] = {}
    for file in files:
        try:
            loaded[file] = read_tensors(file)
        except WeightFileError as error:
            problems.add(f"{file.name} changed or vanished while it was read: {error}")
            return
        # One that is gone was read in full all the same.
        if _stamp(file) not in (stamps[file], None):
            problems.add(f"{file.name} changed while it was read; try again")
            return
    for module, a, b in pairs:
        if a is None or b is None:
            continue
        a_data, b_data = loaded[a.file].get(a.name), loaded[b.file].get(b.name)
        if a_data is None or b_data is None or a_data.shape != a.shape or b_data.shape != b.shape:
            problems.add(f"{a.file.name} changed while it was read; try again")
            return
        yield module, a_data, b_data


def _stamp(file: Path) -> _Stamp | None:
    """Changes with the file's content; None if it is not there."""
    try:
        info = file.stat()
    except OSError:
        return None
    return info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns


def _is_finite(view: torch.Tensor) -> bool:
    low, high = torch.aminmax(view)  # NaN propagates to both
    return math.isfinite(low.item()) and math.isfinite(high.item())
