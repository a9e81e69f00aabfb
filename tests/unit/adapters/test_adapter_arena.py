"""Device memory of adapters: pages of their true rank, tables that never lie."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lorax_backend.adapters.arena import LoraArena, site_kind
from lorax_backend.adapters.host_adapter import HostAdapter
from lorax_kernels.layout import LoraSite, PageLayout, pages_for_rank

LAYOUT = PageLayout(
    {
        "layers.0.qkv": LoraSite(16, (16, 8, 8)),
        "layers.1.qkv": LoraSite(16, (16, 8, 8)),
        "lm_head": LoraSite(16, (40,)),
    }
)


def make_arena(num_pages: int = 6, max_slots: int = 4, max_rank: int = 32) -> LoraArena:
    return LoraArena(LAYOUT, num_pages, max_slots, torch.float32, "cpu", max_rank)


def make_adapter(
    rank: int, value: float = 1.0, sites: frozenset[str] = frozenset({"lm_head"})
) -> HostAdapter:
    return HostAdapter(torch.full((pages_for_rank(rank), LAYOUT.page_size), value), rank, sites)


def put(arena: LoraArena, adapter: HostAdapter) -> int:
    slot = arena.allocate(adapter.rank)
    assert slot is not None
    arena.write(slot, adapter)
    arena.check()
    return slot


def test_a_new_arena_is_zero_and_empty() -> None:
    arena = make_arena()
    assert not arena.pages.any()
    assert (arena.slot_pages == -1).all()
    assert not arena.slot_ranks.any()
    assert (arena.num_free_pages, arena.num_used_pages, arena.num_used_slots) == (6, 0, 0)
    assert arena.slot_pages.dtype == arena.slot_ranks.dtype == np.int32


@pytest.mark.parametrize(("rank", "pages"), [(1, 1), (8, 1), (9, 2), (32, 4)])
def test_an_adapter_takes_the_pages_of_its_true_rank(rank: int, pages: int) -> None:
    arena = make_arena()
    slot = put(arena, make_adapter(rank))
    assert arena.num_used_pages == pages
    assert (arena.slot_pages[slot] >= 0).sum() == pages
    assert arena.slot_ranks[slot] == rank


def test_pages_hold_what_was_written_in_rank_order() -> None:
    arena = make_arena()
    first, second = put(arena, make_adapter(4)), put(arena, make_adapter(12))
    arena.free(first)
    adapter = HostAdapter(torch.randn(3, LAYOUT.page_size), 20, frozenset({"lm_head"}))
    slot = put(arena, adapter)
    assert sorted(set(arena.slot_pages[slot][:3]) & set(arena.slot_pages[second])) == []
    assert torch.equal(arena.pages[arena.slot_pages[slot][:3]], adapter.pages)


def test_a_reused_page_keeps_nothing_of_its_last_owner() -> None:
    arena = make_arena(num_pages=1)
    arena.free(put(arena, make_adapter(8, value=float("nan"))))
    slot = put(arena, make_adapter(3, value=0.0))
    assert not arena.pages[arena.slot_pages[slot, 0]].any()


def test_a_freed_slot_is_blank_in_every_table() -> None:
    arena = make_arena()
    slot = put(arena, make_adapter(16))
    arena.free(slot)
    assert (arena.slot_pages[slot] == -1).all()
    assert arena.slot_ranks[slot] == 0
    assert not arena.slot_sites[slot].any()
    assert not arena.slot_has(slot, "lm_head")
    assert arena.num_free_pages == 6


def test_no_room_is_none_and_changes_nothing() -> None:
    arena = make_arena(num_pages=3, max_slots=2)
    put(arena, make_adapter(16))
    before = arena.slot_pages.copy()
    assert arena.allocate(16) is None, "no pages"
    put(arena, make_adapter(8))
    assert arena.allocate(8) is None, "no slots"
    assert (arena.slot_pages[0] == before[0]).all()
    arena.check()


def test_a_rank_that_never_fits_is_told_from_one_that_does_not_fit_now() -> None:
    arena = make_arena(num_pages=6, max_rank=32)
    put(arena, make_adapter(32))
    assert arena.fits(32)
    assert not arena.can_allocate(32)
    assert not arena.fits(33), "above the largest rank"
    assert not make_arena(num_pages=2).fits(24), "more pages than there are"


def test_tables_know_which_sites_an_adapter_touches() -> None:
    arena = make_arena()
    head = put(arena, make_adapter(8))
    late = put(arena, make_adapter(8, sites=frozenset({"layers.1.qkv"})))
    assert arena.site_kinds == ("qkv", "lm_head")
    assert arena.slot_has(head, "lm_head")
    assert not arena.slot_has(head, "qkv")
    assert arena.slot_has(late, "qkv")
    assert not arena.slot_has(late, "router"), "a kind this model does not have"
    assert arena.site_mask("layers.0.qkv").tolist() == [False] * 4
    assert arena.site_mask("layers.1.qkv").nonzero()[0].tolist() == [late]
    assert arena.kind_mask("lm_head").nonzero()[0].tolist() == [head]
    assert site_kind("layers.12.gate_up") == "gate_up"


def test_tables_are_live() -> None:
    arena = make_arena()
    pages, ranks, mask = arena.slot_pages, arena.slot_ranks, arena.kind_mask("lm_head")
    slot = put(arena, make_adapter(8))
    assert pages[slot, 0] >= 0
    assert ranks[slot] == 8
    assert mask[slot]


def test_misuse_is_refused() -> None:
    arena = make_arena()
    with pytest.raises(ValueError, match="not allocated"):
        arena.write(0, make_adapter(8))
    slot = arena.allocate(8)
    assert slot is not None
    with pytest.raises(ValueError, match="rank 16"):
        arena.write(slot, make_adapter(16))
    with pytest.raises(ValueError, match="float16"):
        arena.write(slot, HostAdapter(torch.zeros(1, LAYOUT.page_size, dtype=torch.float16), 8, frozenset()))
    arena.free(slot)
    with pytest.raises(ValueError, match="twice"):
        arena.free(slot)
    with pytest.raises(ValueError, match="num_pages=0"):
        make_arena(num_pages=0)
