from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lorax_backend.scheduler.block_manager import BlockManager
from lorax_backend.scheduler.sequence import Sequence
from lorax_backend.types import SamplingParams


def make_sequence(handle: int, token_ids: list[int], cache_key: str = "") -> Sequence:
    seq = Sequence(handle, len(token_ids), SamplingParams(8), None, 0, 0.0, list(token_ids))
    seq.cache_key = cache_key
    return seq


def admit(blocks: BlockManager, seq: Sequence) -> int:
    """Allocate, compute and register everything; how many tokens the cache had."""
    prefix = blocks.match(seq)
    blocks.allocate(seq, prefix)
    seq.num_computed = len(seq.token_ids)
    blocks.register(seq)
    return len(prefix) * blocks.block_size


def test_blocks_are_counted_by_rounding_tokens_up() -> None:
    blocks = BlockManager(8, 4)
    assert [blocks.blocks_for(n) for n in (1, 4, 5, 8)] == [1, 1, 2, 2]


def test_an_equal_prompt_finds_all_blocks_but_the_last_tokens() -> None:
    blocks = BlockManager(8, 4)
    first, second = make_sequence(1, list(range(8))), make_sequence(2, list(range(8)))
    assert admit(blocks, first) == 0
    assert admit(blocks, second) == 4, "the block of the last token must be computed again"
    assert second.block_table[0] == first.block_table[0]
    assert second.block_table[1] != first.block_table[1]
    blocks.check_integrity([first, second])


def test_a_longer_prompt_shares_every_full_block() -> None:
    blocks = BlockManager(8, 4)
    first, second = make_sequence(1, list(range(8))), make_sequence(2, list(range(9)))
    admit(blocks, first)
    assert admit(blocks, second) == 8
    assert second.block_table[:2] == first.block_table


def test_equal_tokens_under_another_adapter_share_nothing() -> None:
    blocks = BlockManager(8, 4)
    admit(blocks, make_sequence(1, list(range(9)), "falcon"))
    assert admit(blocks, make_sequence(2, list(range(9)), "otter")) == 0


def test_equal_tokens_after_another_beginning_share_nothing() -> None:
    blocks = BlockManager(8, 4)
    admit(blocks, make_sequence(1, [1, 1, 1, 1, 5, 6, 7, 8, 9]))
    assert admit(blocks, make_sequence(2, [2, 2, 2, 2, 5, 6, 7, 8, 9])) == 0


def test_a_freed_block_is_found_again_until_its_room_is_needed() -> None:
    blocks = BlockManager(2, 4)
    first = make_sequence(1, list(range(5)))
    admit(blocks, first)
    blocks.free(first)
    assert (blocks.num_used, blocks.num_cached, blocks.num_available) == (0, 1, 2)
    again = make_sequence(2, list(range(5)))
    assert admit(blocks, again) == 4
    blocks.free(again)
    admit(blocks, make_sequence(3, [7] * 8))
    assert blocks.match(make_sequence(4, list(range(5)))) == []


def test_the_least_recently_used_prefix_is_evicted_first() -> None:
    blocks = BlockManager(4, 2)
    old, young = make_sequence(1, [1, 1, 1]), make_sequence(2, [2, 2, 2])
    for seq in (old, young):
        admit(blocks, seq)
        blocks.free(seq)
    touched = make_sequence(3, [1, 1, 1])
    admit(blocks, touched)
    blocks.free(touched)
    admit(blocks, make_sequence(4, [9] * 6))
    assert len(blocks.match(make_sequence(5, [1, 1, 1]))) == 1
    assert blocks.match(make_sequence(6, [2, 2, 2])) == []


def test_the_end_of_a_sequence_is_evicted_before_its_beginning() -> None:
    blocks = BlockManager(3, 2)
    seq = make_sequence(1, [1, 2, 3, 4, 5, 6])
    admit(blocks, seq)
    blocks.free(seq)
    admit(blocks, make_sequence(2, [9]))
    assert len(blocks.match(make_sequence(3, [1, 2, 3, 4, 5, 6, 7]))) == 2


def test_matching_blocks_that_nobody_uses_count_as_taken() -> None:
    blocks = BlockManager(2, 4)
    seq = make_sequence(1, list(range(5)))
    admit(blocks, seq)
    blocks.free(seq)
    longer = make_sequence(2, list(range(9)))
    prefix = blocks.match(longer)
    assert len(prefix) == 1
    assert not blocks.can_allocate(longer, prefix)
    with pytest.raises(RuntimeError, match="without room"):
        blocks.allocate(longer, prefix)


def test_blocks_whose_step_is_not_scheduled_are_not_shared() -> None:
    blocks = BlockManager(8, 4)
    seq = make_sequence(1, list(range(8)))
    blocks.allocate(seq, [])
    seq.num_computed = 5
    blocks.register(seq)
    assert len(blocks.match(make_sequence(2, list(range(9))))) == 1


def test_generated_tokens_are_shared_once_they_are_known() -> None:
    blocks = BlockManager(8, 4)
    seq = make_sequence(1, [1, 2, 3])
    admit(blocks, seq)
    seq.num_computed = 4  # a step that computes a token still on the device
    blocks.register(seq)
    assert blocks.match(make_sequence(2, [1, 2, 3, 4, 5])) == []
    seq.token_ids.append(4)
    blocks.register(seq)
    assert blocks.match(make_sequence(3, [1, 2, 3, 4, 5])) == seq.block_table


def test_after_a_reset_nothing_is_shared_and_users_keep_their_blocks() -> None:
    blocks = BlockManager(8, 4)
    gone, stays = make_sequence(1, [1] * 8), make_sequence(2, [2] * 8)
    admit(blocks, gone)
    admit(blocks, stays)
    blocks.free(gone)
    table = list(stays.block_table)
    blocks.reset_prefix_cache()
    assert stays.block_table == table
    assert (blocks.num_cached, blocks.num_used) == (0, 2)
    assert blocks.match(make_sequence(3, [1] * 9)) == blocks.match(make_sequence(4, [2] * 9)) == []
    blocks.check_integrity([stays])


def test_without_prefix_caching_nothing_is_shared_or_kept() -> None:
    blocks = BlockManager(8, 4, prefix_caching=False)
    seq = make_sequence(1, list(range(9)))
    admit(blocks, seq)
    assert blocks.match(make_sequence(2, list(range(9)))) == []
    blocks.free(seq)
    assert (blocks.num_cached, blocks.num_available) == (0, 8)


def test_a_block_freed_twice_is_reported() -> None:
    blocks = BlockManager(8, 4)
    seq = make_sequence(1, [1] * 4)
    admit(blocks, seq)
    stale = make_sequence(1, [1] * 4)
    stale.block_table = list(seq.block_table)
    blocks.free(seq)
    with pytest.raises(RuntimeError, match="freed twice"):
        blocks.free(stale)


def test_the_check_names_a_leaked_block() -> None:
    blocks = BlockManager(8, 4)
    seq = make_sequence(1, [1] * 4)
    admit(blocks, seq)
    with pytest.raises(RuntimeError, match=r"1 users counted, 0 block tables"):
        blocks.check_integrity([])


class BlockManagerMachine(RuleBasedStateMachine):
    """Random sequences over few tokens and keys, so that prefixes meet. `contents` says what is in every block."""

    @initialize(num_blocks=st.integers(1, 12), block_size=st.integers(1, 4), prefix_caching=st.booleans())
    def start(self, num_blocks: int, block_size: int, prefix_caching: bool) -> None:
        self.blocks = BlockManager(num_blocks, block_size, prefix_caching)
        self.sequences: list[Sequence] = []
        self.contents: dict[int, tuple[str, tuple[int, ...]]] = {}
        self.handles = iter(range(10**6))

    @rule(
        token_ids=st.lists(st.integers(0, 1), min_size=1, max_size=20),
        cache_key=st.sampled_from(["", "falcon"]),
        reserve=st.integers(0, 3),
    )
    def admit(self, token_ids: list[int], cache_key: str, reserve: int) -> None:
        seq = make_sequence(next(self.handles), token_ids, cache_key)
        prefix = self.blocks.match(seq)
        size = self.blocks.block_size
        assert len(prefix) * size < len(token_ids)
        for index, block in enumerate(prefix):
            assert self.contents[block] == (cache_key, tuple(token_ids[: (index + 1) * size])), (
                "a foreign block"
            )
        if not self.blocks.can_allocate(seq, prefix, reserve):
            return
        self.blocks.allocate(seq, prefix)
        assert self.blocks.num_available >= reserve
        seq.num_computed = len(prefix) * size
        self.sequences.append(seq)

    @precondition(lambda self: self.sequences)
    @rule(choice=st.integers(0, 99), count=st.integers(1, 8))
    def compute(self, choice: int, count: int) -> None:
        seq = self.sequences[choice % len(self.sequences)]
        seq.num_computed = min(len(seq.token_ids), seq.num_computed + count)
        size = self.blocks.block_size
        for index in range(seq.num_computed // size):
            written = (seq.cache_key, tuple(seq.token_ids[: (index + 1) * size]))
            self.contents[seq.block_table[index]] = written
        self.blocks.register(seq)

    @precondition(lambda self: self.sequences)
    @rule(choice=st.integers(0, 99), token_id=st.integers(0, 1))
    def generate(self, choice: int, token_id: int) -> None:
        seq = self.sequences[choice % len(self.sequences)]
        if self.blocks.can_append(seq, len(seq.token_ids) + 1):
            seq.token_ids.append(token_id)
            self.blocks.append(seq, len(seq.token_ids))

    @precondition(lambda self: self.sequences)
    @rule(choice=st.integers(0, 99))
    def free(self, choice: int) -> None:
        self.blocks.free(self.sequences.pop(choice % len(self.sequences)))

    @rule()
    def reset(self) -> None:
        self.blocks.reset_prefix_cache()

    @invariant()
    def every_block_is_accounted_for(self) -> None:
        self.blocks.check_integrity(self.sequences)
        assert self.blocks.num_used + self.blocks.num_available == self.blocks.num_blocks

    def teardown(self) -> None:
        for seq in self.sequences:
            self.blocks.free(seq)
        assert self.blocks.num_used == 0
        assert self.blocks.num_available == self.blocks.num_blocks


BlockManagerMachine.TestCase.settings = settings(
    max_examples=80, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestRandomOperationsOnBlocks = BlockManagerMachine.TestCase
