"""Building blocks of the decoder that are not kernels: linear layers and the tables of the rotary embedding."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from lorax_backend.model.config import RopeConfig
from lorax_kernels import begin_linear, linear, linear_silu_mul, silu_mul


class Linear:
    """y = x @ weight.T + bias, with `weight` [out, in] and `bias` [out] or None.

    `pack` changes a float32 weight on the CPU into oneDNN's blocked form, which a few rows multiply about twice as
    fast as the plain one; the plain weight is dropped.
    """

    __slots__ = ("_packed", "bias", "weight")

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self.weight: torch.Tensor | None = weight
        self.bias = bias
        self._packed: torch.Tensor | None = None

    def pack(self) -> None:
        """Use oneDNN's weight format from now on; does nothing where it cannot be had."""
        weight = self.weight
        if weight is None or weight.device.type != "cpu" or weight.dtype != torch.float32:
            return
        if packing_supported():
            self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
            self.weight = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, in] -> [T, out]."""
        if self._packed is not None:
            return _packed_linear(x, self._packed, self.bias)
        assert self.weight is not None
        if _on_device(x):
            return linear(x, self.weight, self.bias)
        return F.linear(x, self.weight, self.bias)

    def begin(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, in] -> [T, out] for a norm or the rotation to read, as `lorax_kernels.begin_linear`."""
        if self.weight is not None and _on_device(x):
            return begin_linear(x, self.weight, self.bias)
        return self(x)

    def silu_mul(self, x: torch.Tensor) -> torch.Tensor:
        """`lorax_kernels.silu_mul` of this layer: x [T, in] -> [T, out / 2], with gate before up in `weight`."""
        if self.weight is not None and _on_device(x):
            return linear_silu_mul(x, self.weight, self.bias)
        return silu_mul(self(x))


def _on_device(x: torch.Tensor) -> bool:
    return x.is_cuda


def _packed_linear(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return y


_packing_supported: bool | None = None


def packing_supported() -> bool:
    """True if this build of torch has the packed linear layer and it gives the right answer. Looked at once, because
    the operators behind it are not part of torch's public interface."""
    global _packing_supported
    if _packing_supported is None:
        _packing_supported = _packing_works()
    return _packing_supported


def _packing_works() -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    weight = torch.arange(48 * 32, dtype=torch.float32).reshape(48, 32).remainder(7.0)
    x = torch.arange(5 * 32, dtype=torch.float32).reshape(5, 32).remainder(5.0)
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight)
        return torch.allclose(
            _packed_linear(x, packed, weight[:, 0].contiguous()), F.linear(x, weight, weight[:, 0])
        )
    except (AttributeError, RuntimeError, TypeError):
        return False


def rope_frequencies(rope: RopeConfig, head_dim: int) -> tuple[torch.Tensor, float]:
    """Angular frequencies [head_dim / 2] in radians a token, float32, and the factor on cos and sin.

    'default' is Su et al. 2021. 'linear' divides every frequency by `factor`. 'dynamic' changes frequencies only
    beyond `max_position_embeddings`, which this server does not go beyond, so it equals 'default' here. 'llama3' and
    'yarn' are below.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies = 1.0 / (rope.theta**exponents)
    if rope.rope_type == "linear":
        return frequencies / _needed(rope, "factor"), 1.0
    if rope.rope_type == "llama3":
        return _llama3_frequencies(rope, frequencies), 1.0
    if rope.rope_type == "yarn":
        return _yarn_frequencies(rope, frequencies, head_dim), _yarn_attention_factor(rope)
    return frequencies, 1.0


def rope_tables(rope: RopeConfig, head_dim: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [length, head_dim / 2] of every position, float32, on the CPU."""
    frequencies, factor = rope_frequencies(rope, head_dim)
    angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies)
    return angles.cos() * factor, angles.sin() * factor


def doubled_rope(cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Tables [length, head_dim / 2] -> [length, 1, head_dim] as the kernels take them: (cos, cos) and (-sin, sin)."""
    return torch.cat((cos, cos), -1).unsqueeze(1), torch.cat((-sin, sin), -1).unsqueeze(1)


def _needed(rope: RopeConfig, name: str) -> float:
    value = rope.get(name)
    if value is None:
        raise ValueError(f"rope type {rope.rope_type} needs {name}")
    return value


def _llama3_frequencies(rope: RopeConfig, frequencies: torch.Tensor) -> torch.Tensor:
    """Llama 3.1: wavelengths beyond the old context over `low_freq_factor` are stretched by `factor`, those below it
    over `high_freq_factor` are kept, and between them the two are blended linearly in context / wavelength."""
    factor, old_context = _needed(rope, "factor"), _needed(rope, "original_max_position_embeddings")
    low, high = _needed(rope, "low_freq_factor"), _needed(rope, "high_freq_factor")
    turns = old_context * frequencies / (2 * math.pi)  # rotations within the old context
    keep = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return frequencies * (keep + (1.0 - keep) / factor)


def _yarn_frequencies(rope: RopeConfig, frequencies: torch.Tensor, head_dim: int) -> torch.Tensor:
    """YaRN (Peng et al. 2023, section 3.2): pairs that turn more than `beta_fast` times within the old context are
    kept, those that turn less than `beta_slow` times are stretched by `factor`, with a linear ramp over the index."""
    factor, old_context = _needed(rope, "factor"), _needed(rope, "original_max_position_embeddings")

    def index_of(turns: float) -> float:
        return head_dim * math.log(old_context / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    first, last = index_of(rope.get("beta_fast") or 32.0), index_of(rope.get("beta_slow") or 1.0)
    if rope.get("truncate") in (None, 1.0):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    if first == last:
        last += 0.001  # a ramp of no width would divide by zero
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - first) / (last - first)).clamp(0.0, 1.0)
    return frequencies * (1.0 - ramp) + frequencies / factor * ramp


def _yarn_attention_factor(rope: RopeConfig) -> float:
    given = rope.get("attention_factor")
    if given is not None:
        return given
    factor = _needed(rope, "factor")

    def scale(weight: float) -> float:
        return 1.0 if factor <= 1.0 else 0.1 * weight * math.log(factor) + 1.0

    numerator, denominator = rope.get("mscale"), rope.get("mscale_all_dim")
    if numerator and denominator:
        return scale(numerator) / scale(denominator)
    return scale(1.0)
