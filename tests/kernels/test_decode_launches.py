"""How decode attention is launched: in a step beside a graph as in the graph, so that nothing is compiled for it."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from lorax_backend.model.graphs import graph_sizes
from lorax_kernels.attention_triton import _decode_splits, _padded


@pytest.mark.parametrize("heads", [1, 2, 3, 8])
@pytest.mark.parametrize("programs", [4 * 132, 6 * 132, 5 * 108])
def test_any_number_of_decodes_is_launched_as_some_graph_is(heads: int, programs: int) -> None:
    captured = {_decode_splits(size * heads, programs) for size in graph_sizes(256)}
    for decodes in range(1, 257):
        assert _decode_splits(_padded(decodes) * heads, programs) in captured, decodes
        assert decodes <= _padded(decodes) < decodes + 8
