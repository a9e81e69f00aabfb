"""Integer arithmetic of launches. Triton's own functions of this kind can be called in kernels too, and pay for that
with two microseconds a call on the host, in every layer of every step."""

from __future__ import annotations


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n, for n >= 1."""
    return 1 << (n - 1).bit_length()


def cdiv(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)
