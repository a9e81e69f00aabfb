"""From a PEFT folder to an `AdapterPlan`: every tensor matched with a layer of the base, and checked.

Nothing here reaches the network. All problems of an adapter are found and reported together, because
each one fixed costs its author an upload.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from lorax_backend.adapters.adapter_plan import AdapterPlan, Module, Problems, Structure, file_stamp
from lorax_backend.adapters.page_writer import PageWriter
from lorax_backend.adapters.peft_config import MAX_CONFIG_BYTES, PeftConfig, read_peft_config
from lorax_backend.adapters.tensor_names import LORA_A, LORA_B, TensorName, parse_tensor_name
from lorax_backend.adapters.weight_files import CONFIG_NAME, PICKLE_NAME, choose_weight_names
from lorax_backend.adapters.weight_reader import (
    StoredTensor,
    WeightFileError,
    file_format,
    read_header,
    read_raw_header,
)
from lorax_backend.errors import AdapterIncompatibleError, AdapterNotFoundError
from lorax_backend.model.lora import LoraTarget
from lorax_kernels.layout import PageLayout

_DTYPES = ("F32", "F16", "BF16", "F64")
_MAX_KNOWN = 32


class AdapterInspector:
    """Checks adapters against one base model; from any thread."""

    def __init__(
        self,
        targets: Mapping[str, LoraTarget],
        layout: PageLayout,
        dtype: torch.dtype,
        max_rank: int,
        allow_pickle: bool = False,
        writer: PageWriter | None = None,
    ) -> None:
        """`targets` maps module paths of the base model to their places in `layout`. The weights will be in `dtype`,
        with the scaling (alpha / r, or alpha / sqrt(r)) folded into B in float32 before the cast. `allow_pickle` lets
        adapter_model.bin be read where there are no safetensors. `writer` is for the plans."""
        self._targets = targets
        self._layout = layout
        self._dtype = dtype
        self._max_rank = max_rank
        self._allow_pickle = allow_pickle
        self._writer = writer
        self._known: OrderedDict[bytes, Structure] = OrderedDict()
        self._lock = threading.Lock()

    def inspect(self, folder: Path) -> AdapterPlan:
        """Check the PEFT adapter in `folder`, reading headers only. One that has the configuration and the headers of
        another, byte for byte, as adapters trained by one program mostly have, is not looked at any further.

        Raises:
            AdapterNotFoundError: the folder holds no adapter_config.json or no weights.
            AdapterIncompatibleError: naming everything that does not fit the base or is not supported.
            AdapterTooLargeError: the only problem is a rank above `max_rank`.
        """
        try:
            names = [entry.name for entry in folder.iterdir() if entry.is_file()]
            if CONFIG_NAME not in names:
                raise FileNotFoundError
            weights = choose_weight_names(names, self._allow_pickle)
            stamps = {name: file_stamp(folder / name) for name in weights}
            key = _fingerprint(folder, weights)
            structure = self._recall(key)
            if structure is None:
                structure = self._look_at(folder, weights)
                if key == _fingerprint(folder, weights):  # else it was replaced meanwhile, and may be a mix
                    self._remember(key, structure)
        except (FileNotFoundError, NotADirectoryError):
            raise AdapterNotFoundError(f"{folder} holds no {CONFIG_NAME}, so it is no PEFT adapter") from None
        except OSError as error:
            raise AdapterNotFoundError(f"adapter folder {folder} cannot be read: {error.strerror}") from None
        return AdapterPlan(folder, structure, self._layout, self._dtype, stamps, self._writer)

    def _look_at(self, folder: Path, weights: Iterable[str]) -> Structure:
        problems = Problems()
        config, config_problems = read_peft_config(folder)
        for problem in config_problems:
            problems.add(problem)
        stored = [tensor for name in weights for tensor in _read_header(folder / name, problems)]
        modules = _match_modules(stored, self._targets, problems)
        for module in modules.values():
            _check_shapes(module, problems)
        if config is not None:
            _check_against_config(modules, config, self._max_rank, problems)
        problems.raise_if_any(folder)
        if not modules:
            raise AdapterIncompatibleError(f"adapter {folder.name} holds no LoRA weights")
        return Structure(max(module.rank for module in modules.values()), modules)

    def _recall(self, key: bytes | None) -> Structure | None:
        with self._lock:
            structure = self._known.get(key) if key is not None else None
            if structure is not None and key is not None:
                self._known.move_to_end(key)
            return structure

    def _remember(self, key: bytes | None, structure: Structure) -> None:
        if key is None:
            return
        with self._lock:
            self._known[key] = structure
            if len(self._known) > _MAX_KNOWN:
                self._known.popitem(last=False)


def _fingerprint(folder: Path, weights: Iterable[str]) -> bytes | None:
    """Tells adapters apart by all that is looked at in them; None for files that must be read in full for that, and
    for damaged ones.

    Raises:
        OSError: the configuration cannot be read.
    """
    with (folder / CONFIG_NAME).open("rb") as opened:
        found = hashlib.sha256(opened.read(MAX_CONFIG_BYTES + 1))
    for name in weights:
        if name == PICKLE_NAME:
            return None
        try:
            size, header = read_raw_header(folder / name)
        except (OSError, ValueError):
            return None
        found.update(f"{name} {size} {len(header)} ".encode())
        found.update(header)
    return found.digest()


def _read_header(file: Path, problems: Problems) -> list[StoredTensor]:
    try:
        return read_header(file)
    except WeightFileError as error:
        problems.add(
            f"{file.name} is damaged, truncated or not {file_format(file)} ({error}); save or download it again"
        )
        return []


def _match_modules(
    stored: Iterable[StoredTensor], targets: Mapping[str, LoraTarget], problems: Problems
) -> dict[str, Module]:
    modules: dict[str, Module] = {}
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
    modules: dict[str, Module],
    targets: Mapping[str, LoraTarget],
    problems: Problems,
) -> None:
    module = modules.setdefault(name.module, Module(name.module, name.raw_module, targets[name.module]))
    taken = module.a if name.part == LORA_A else module.b
    if taken is not None:
        problems.add_tensor(tensor, f"the same {name.part} as {taken.name}")
    elif name.part == LORA_A:
        module.a = tensor
    else:
        module.b = tensor


def _check_shapes(module: Module, problems: Problems) -> None:
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
    modules: Mapping[str, Module], config: PeftConfig, max_rank: int, problems: Problems
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
