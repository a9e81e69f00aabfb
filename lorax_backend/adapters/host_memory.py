"""The host memory of adapters: one tensor of pages of the device arena's layout, allocated once."""

from __future__ import annotations

import logging

import torch

from lorax_kernels.layout import PageLayout

_log = logging.getLogger(__name__)

_PORTABLE_AND_MAPPED = 0x01 | 0x02  # cudaHostRegister: for all contexts, and kernels can write to it


class HostMemory:
    """As many pages as fit into `budget` bytes, in [num_pages, layout.page_size] of `dtype`.

    With `pinned` they are page-locked once, at start, so that copies to the device never wait, the device can write to
    them, and no load pays for locking. Without, the system gives each page its memory when it is first written, so an
    idle server has none.
    """

    def __init__(self, layout: PageLayout, budget: int, dtype: torch.dtype, pinned: bool = False) -> None:
        self.page_bytes = layout.page_size * dtype.itemsize
        self.num_pages = budget // self.page_bytes
        self._pages = torch.empty(self.num_pages, layout.page_size, dtype=dtype)
        self.pinned = pinned and self.num_pages > 0 and self._pin()

    def pages(self, first: int, count: int) -> torch.Tensor:
        """A view [count, page_size]; holds whatever its last owner left there."""
        return self._pages[first : first + count]

    def close(self) -> None:
        """Undo the page-locking. No copy may be under way."""
        if self.pinned:
            torch.cuda.cudart().cudaHostUnregister(self._pages.data_ptr())
            self.pinned = False

    def _pin(self) -> bool:
        # torch's own pinned allocations are rounded up to a power of two; registering ours is not.
        size = self._pages.numel() * self._pages.element_size()
        code = torch.cuda.cudart().cudaHostRegister(self._pages.data_ptr(), size, _PORTABLE_AND_MAPPED)
        if int(code):
            _log.warning(
                "%d bytes of host memory for adapters could not be page-locked (code %s): copies to the device will be "
                "slower; a smaller adapter_host_bytes or a higher limit of locked memory (ulimit -l) helps",
                size,
                code,
            )
        return not int(code)
