"""Tensors out of safetensors files and, where the server allows it, out of pickles that hold tensors alone."""

from __future__ import annotations

import io
import json
import math
import os
import pickle
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from lorax_backend.adapters.parallel import WORKERS, in_parallel
from lorax_backend.adapters.weight_files import PICKLE_NAME

_LEAST_PART = 4 << 20
_MAX_HEADER = 100_000_000  # bytes, as in the format's specification
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}

_PICKLE_DTYPES = {dtype: name for name, dtype in _DTYPES.items()}


class WeightFileError(Exception):
    """The file cannot be read, or is not what its name says."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """What a file says of a tensor; `file` is the file's name, `dtype` in safetensors' words."""

    file: str
    name: str
    shape: tuple[int, ...]
    dtype: str


def file_format(file: Path) -> str:
    """What the file ought to be."""
    return "a pickle of tensors" if file.name == PICKLE_NAME else "safetensors"


def read_header(file: Path) -> list[StoredTensor]:
    """The tensors in a file, without their values where the format allows.

    Raises:
        WeightFileError: it is damaged, truncated or of another format.
    """
    if file.name == PICKLE_NAME:
        return [
            StoredTensor(
                file.name, name, tuple(tensor.shape), _PICKLE_DTYPES.get(tensor.dtype, str(tensor.dtype))
            )
            for name, tensor in read_tensors(file).items()
        ]
    try:
        with safe_open(file, framework="pt") as handle:
            tensors = []
            for name in handle.keys():  # noqa: SIM118 - not a mapping
                view = handle.get_slice(name)
                tensors.append(StoredTensor(file.name, name, tuple(view.get_shape()), view.get_dtype()))
            return tensors
    except (SafetensorError, OSError) as error:
        raise WeightFileError(str(error)) from None


def read_tensors(file: Path) -> dict[str, torch.Tensor]:
    """All tensors of a file. It is read, not mapped: a mapped file cut short meanwhile kills the process. Those of
    safetensors share one buffer, which lives as long as one of them.

    Raises:
        WeightFileError: it is damaged, truncated, of another format, or a pickle of anything but tensors.
    """
    try:
        if file.name != PICKLE_NAME:
            return _views(_read_whole(file))
        data = io.BytesIO(file.read_bytes())
        loaded = torch.load(data, map_location="cpu", weights_only=True)
    except (
        OSError,
        EOFError,
        RuntimeError,
        ValueError,
        TypeError,
        LookupError,
        pickle.UnpicklingError,
    ) as error:
        raise WeightFileError(str(error).partition("\n")[0]) from None
    if not isinstance(loaded, dict) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
        raise WeightFileError("it holds something else than named tensors")
    return {str(name): tensor for name, tensor in loaded.items()}


@dataclass(frozen=True, slots=True)
class Extent:
    """A tensor's values in a safetensors file: bytes [begin, end) of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def read_extents(opened: FileIO) -> dict[str, Extent]:
    """Where the tensors of an open safetensors file lie; those of types that no weight has are left out.

    Raises:
        OSError, ValueError, TypeError, LookupError: the file cannot be read, its header is not what the format's
            specification says, or its offsets do not fit the file.
    """
    size, header = _raw_header(opened)
    return _extents(header, size)


def read_raw_header(file: Path) -> tuple[int, bytes]:
    """Bytes of a safetensors file, and the bytes of its header.

    Raises:
        OSError, ValueError: it cannot be read, or has none.
    """
    with file.open("rb", buffering=0) as opened:
        return _raw_header(opened)


def _raw_header(opened: FileIO) -> tuple[int, bytes]:
    size = os.fstat(opened.fileno()).st_size
    length = _header_length(os.pread(opened.fileno(), 8, 0), size)
    return size, os.pread(opened.fileno(), length, 8)


def read_into(opened: FileIO, begin: int, target: torch.Tensor) -> None:
    """Fill `target`, uint8 [bytes] on the host, with what lies in the file from byte `begin` on. Parts are read side
    by side, since memory touched for the first time takes most of the time.

    Raises:
        OSError, ValueError: the file cannot be read, or ends before.
    """
    size = len(target)
    part = max(_LEAST_PART, -(-size // WORKERS))
    whole = target.numpy().data

    def read(offset: int) -> None:
        view = whole[offset : offset + part]
        while view:
            count = os.preadv(opened.fileno(), [view], begin + offset)
            if not count:
                raise ValueError("it ends too soon")
            view, offset = view[count:], offset + count

    in_parallel(read, range(0, size, part))


def _read_whole(file: Path) -> torch.Tensor:
    with file.open("rb", buffering=0) as opened:
        data = torch.empty(os.fstat(opened.fileno()).st_size, dtype=torch.uint8)
        read_into(opened, 0, data)
    return data


def _views(data: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensors in the bytes of a safetensors file, without a copy: the library's own reader copies every tensor
    twice while it keeps all other threads of the process from running.

    Raises:
        ValueError, TypeError, LookupError: as `read_extents`.
    """
    length = _header_length(data[:8].numpy().tobytes(), len(data))
    found = {}
    for name, extent in _extents(data[8 : 8 + length].numpy().tobytes(), len(data)).items():
        part = data[extent.begin : extent.end]
        # Files of other writers may begin their data anywhere; a view needs its elements aligned.
        if part.storage_offset() % extent.dtype.itemsize:
            part = part.clone()
        found[name] = part.view(extent.dtype).view(extent.shape)
    return found


def _header_length(begin: bytes, size: int) -> int:
    length = int.from_bytes(begin, "little")
    if size < 8 or length > min(size - 8, _MAX_HEADER):
        raise ValueError("its header is longer than the file")
    return length


def _extents(text: bytes, size: int) -> dict[str, Extent]:
    """The header's entries, of a file of `size` bytes."""
    header = json.loads(text)
    if not isinstance(header, dict):
        raise ValueError("its header names no tensors")
    body = 8 + len(text)
    found = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        dtype, shape = _DTYPES.get(entry["dtype"]), tuple(entry["shape"])
        if dtype is None:
            continue  # which the header was refused for if it matters
        if not 0 <= begin <= end <= size - body or end - begin != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{name} does not fit the file")
        found[name] = Extent(dtype, shape, body + begin, body + end)
    return found
