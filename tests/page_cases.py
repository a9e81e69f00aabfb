"""Adapters whose pages are written by way of the device, and the same by the processor to compare with."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import PREFIX, Base, lora_config, lora_tensors, write_adapter
from safetensors.torch import save_file

from lorax_backend.adapters.adapter_plan import AdapterPlan
from lorax_backend.adapters.page_writer import PageWriter
from lorax_backend.errors import AdapterIncompatibleError

MakePages = Callable[[int], torch.Tensor]
BUFFER = 64 << 10
RANKS = {"q_proj": 1, "k_proj": 3, "o_proj": 12, "down_proj": 8, "lm_head": 16}


class CountingWriter(PageWriter):
    """Knows how many files it has written."""

    files = 0

    def write(self, opened: FileIO, *arguments: Any) -> list[int]:
        self.files += 1
        return super().write(opened, *arguments)


def mixed_tensors(base: Base, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Modules of ranks 1 to 16 at some of the sites; values that round in every type."""
    tensors = {}
    for seed, module in enumerate(base.targets):
        rank = RANKS.get(module.rpartition(".")[2])
        if rank is not None and "layers.1." not in module:
            tensors.update(lora_tensors(base.targets, [module], rank, seed, dtype))
    return tensors


def mixed_config(base: Base, **changes: Any) -> dict[str, Any]:
    return lora_config(
        [module for module in base.targets if module.rpartition(".")[2] in RANKS],
        rank=16,
        rank_pattern={name: rank for name, rank in RANKS.items() if rank != 16},
        alpha_pattern={"o_proj": 7.3},
        **changes,
    )


def plan_of(folder: Path, base: Base, dtype: torch.dtype, writer: PageWriter | None = None) -> AdapterPlan:
    return base.inspector(dtype, writer=writer).inspect(folder)


def assert_same(base: Base, got: torch.Tensor, want: torch.Tensor) -> None:
    """To the bit, but for the gaps between sites, which are nobody's."""
    for name in base.layout.sites:
        for view in (base.layout.a_view, base.layout.b_view):
            assert torch.equal(view(got, name), view(want, name)), name


def check_equal(folder: Path, base: Base, dtype: torch.dtype, writer: PageWriter, make: MakePages) -> None:
    """The writer's pages, poisoned before, are the processor's bit for bit."""
    want = plan_of(folder, base, dtype).load()
    plan = plan_of(folder, base, dtype, writer)
    pages = make(plan.num_pages).fill_(math.nan)
    got = plan.load(pages)
    assert got.pages.data_ptr() == pages.data_ptr()
    assert (got.rank, got.sites, got.modules) == (want.rank, want.sites, want.modules)
    assert_same(base, got.pages, want.pages)


def check_dtypes(
    folder: Path, base: Base, dtype: torch.dtype, writer: CountingWriter, make: MakePages
) -> None:
    """Files of every type a kernel reads, one after the other."""
    for stored in (torch.float32, torch.float16, torch.bfloat16):
        write_adapter(folder, mixed_config(base), mixed_tensors(base, stored))
        check_equal(folder, base, dtype, writer, make)
    assert writer.files == 3


def check_shards(
    folder: Path, base: Base, dtype: torch.dtype, writer: CountingWriter, make: MakePages
) -> None:
    """An adapter in two files, and in a folder without the usual name."""
    tensors = mixed_tensors(base, torch.float32)
    names = sorted(tensors)
    write_adapter(folder, mixed_config(base), None)
    for index, part in enumerate((names[::2], names[1::2])):
        save_file({name: tensors[name] for name in part}, folder / f"adapter-{index}.safetensors")
    check_equal(folder, base, dtype, writer, make)
    assert writer.files == 2


def check_not_finite(
    folder: Path, base: Base, dtype: torch.dtype, writer: PageWriter, make: MakePages
) -> None:
    """NaN, infinity, and what only the scaling makes too large, each named; the rest is not."""
    tensors = mixed_tensors(base, torch.float32)
    bad = [f"{PREFIX}{module}.weight" for module in (
        "model.layers.0.self_attn.q_proj.lora_A", "model.layers.2.mlp.down_proj.lora_B", "lm_head.lora_B")]  # fmt: skip
    tensors[bad[0]][0, 5] = math.nan
    tensors[bad[1]][-1, -1] = -math.inf
    tensors[bad[2]][3, 3] = 3e38  # twice that is no number of any type
    write_adapter(folder, mixed_config(base), tensors)
    plan = plan_of(folder, base, dtype, writer)
    with pytest.raises(AdapterIncompatibleError, match="holds NaN or infinity as") as refused:
        plan.load(make(plan.num_pages))
    named = [name for name in tensors if name in str(refused.value)]
    assert sorted(named) == sorted(bad)


def check_left_alone(
    folder: Path, base: Base, dtype: torch.dtype, writer: CountingWriter, make: MakePages
) -> None:
    """Files for the processor: float64, of several types, and with a tensor larger than a buffer."""
    tensors = mixed_tensors(base, torch.float32)
    mixed = {name: t.half() if "q_proj" in name else t for name, t in tensors.items()}
    for stored in ({name: t.double() for name, t in tensors.items()}, mixed):
        write_adapter(folder, mixed_config(base), stored)
        check_equal(folder, base, dtype, writer, make)
    largest = max(t.numel() * 4 for t in tensors.values())
    small = CountingWriter(writer._device, largest - 512, 2)
    write_adapter(folder, mixed_config(base), tensors)
    check_equal(folder, base, dtype, small, make)
    assert writer.files == small.files == 0


def check_changed(
    folder: Path, base: Base, dtype: torch.dtype, writer: CountingWriter, make: MakePages
) -> None:
    """A file cut short, replaced or taken away after it was looked at."""
    file = folder / "adapter_model.safetensors"
    for change in (
        lambda: file.write_bytes(file.read_bytes()[:-300]),
        lambda: save_file(lora_tensors(base.targets, ["lm_head"], 2), file),
        file.unlink,
    ):
        write_adapter(folder, mixed_config(base), mixed_tensors(base, torch.float32))
        plan = plan_of(folder, base, dtype, writer)
        change()
        with pytest.raises(AdapterIncompatibleError, match=r"adapter_model\.safetensors changed"):
            plan.load(make(plan.num_pages))


def check_replaced(
    folder: Path, base: Base, dtype: torch.dtype, writer: CountingWriter, make: MakePages
) -> None:
    """A file replaced, after it was looked at, by one whose tensors have the same shapes and lie elsewhere: it is
    refused, and adapters of the first one's structure are not read as if they were of its kind."""
    inspector = base.inspector(dtype, writer=writer)
    for name in ("replaced", "twin"):
        write_adapter(folder / name, mixed_config(base), mixed_tensors(base, torch.float32))
    plan = inspector.inspect(folder / "replaced")
    write_adapter(folder / "replaced", None, mixed_tensors(base, torch.float16))
    with pytest.raises(AdapterIncompatibleError, match="changed"):
        plan.load(make(plan.num_pages))
    twin = inspector.inspect(folder / "twin")
    assert twin.structure is plan.structure
    got, want = twin.load(make(twin.num_pages)).pages, plan_of(folder / "twin", base, dtype).load().pages
    assert_same(base, got, want)


def check_threads(folder: Path, base: Base, dtype: torch.dtype, writer: PageWriter, make: MakePages) -> None:
    """Adapters that come at the same time, more of them than there are buffers."""
    folders = [folder / str(seed) for seed in range(6)]
    for seed, each in enumerate(folders):
        tensors = mixed_tensors(base, torch.float16)
        write_adapter(each, mixed_config(base), {name: t * (1 + seed) for name, t in tensors.items()})
    with ThreadPoolExecutor(6) as threads:
        for done in [threads.submit(check_equal, each, base, dtype, writer, make) for each in folders]:
            done.result()
