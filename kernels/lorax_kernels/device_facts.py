"""What of a device decides how kernels are launched on it."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """What kernels and their configurations ask of an NVIDIA device."""

    name: str
    capability: tuple[int, int]
    multiprocessors: int

    @classmethod
    def of(cls, device: torch.device) -> DeviceFacts:
        found = torch.cuda.get_device_properties(device)
        return cls(found.name, (found.major, found.minor), found.multi_processor_count)
