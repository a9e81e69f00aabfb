"""Padded batch sizes of CUDA graphs."""

from __future__ import annotations

from lorax_backend.model.graphs import graph_sizes


def test_sizes_grow_to_the_largest_batch_and_no_further() -> None:
    assert graph_sizes(1) == (1,)
    assert graph_sizes(20) == (1, 2, 4, 8, 16, 20)
    assert graph_sizes(1000)[-1] == 256


def test_no_batch_is_padded_to_much_more_than_itself() -> None:
    sizes = graph_sizes(256)
    for count in range(9, 257):
        assert next(size for size in sizes if size >= count) <= max(count + 8, count * 1.25)
