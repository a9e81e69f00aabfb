"""Tensors out of safetensors files and, where the server allows it, out of pickles that hold tensors alone."""

from __future__ import annotations

import io
import pickle
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from lorax_backend.adapters.weight_files import PICKLE_NAME

_PICKLE_DTYPES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float64: "F64",
}


class WeightFileError(Exception):
    """The file cannot be read, or is not what its name says."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """What a file says of a tensor; `dtype` in safetensors' words."""

    file: Path
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
            StoredTensor(file, name, tuple(tensor.shape), _PICKLE_DTYPES.get(tensor.dtype, str(tensor.dtype)))
            for name, tensor in read_tensors(file).items()
        ]
    try:
        with safe_open(file, framework="pt") as handle:
            tensors = []
            for name in handle.keys():  # noqa: SIM118 - not a mapping
                view = handle.get_slice(name)
                tensors.append(StoredTensor(file, name, tuple(view.get_shape()), view.get_dtype()))
            return tensors
    except (SafetensorError, OSError) as error:
        raise WeightFileError(str(error)) from None


def read_tensors(file: Path) -> dict[str, torch.Tensor]:
    """All tensors of a file. It is read, not mapped: a mapped file cut short meanwhile kills the process.

    Raises:
        WeightFileError: it is damaged, truncated, of another format, or a pickle of anything but tensors.
    """
    try:
        data = file.read_bytes()
        if file.name != PICKLE_NAME:
            return safetensors.torch.load(data)
        loaded = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        raise WeightFileError(str(error).partition("\n")[0]) from None
    if not isinstance(loaded, dict) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
        raise WeightFileError("it holds something else than named tensors")
    return {str(name): tensor for name, tensor in loaded.items()}
