"""Paged KV accounting: which block belongs to whom, and which blocks hold prefixes that can be shared.

A block is in exactly one of three states. *Free*: its contents mean nothing. *Used*: one or more sequences have it in
their block table; `_ref_counts` says how many. *Cached*: nobody uses it, but it still holds a known prefix, so a later
sequence may take it up; cached blocks are given away, least recently used first, when no free ones are left.

A block is shared under the hash of everything that decides its contents: the sequence's `cache_key` (the adapter and
its revision), all tokens before the block, and its own tokens. The hash is SHA-256, not Python's `hash`, because
callers choose the tokens: a collision would show one caller another's context.

When blocks may be shared and reused. The device runs steps in launch order, and a step writes keys and values only at
the positions it was scheduled for.
- A full block may be shared as soon as the step that fills it has been scheduled, provided that the reader's step is
  scheduled later: it then runs later. Blocks filled by the step being put together are registered after it is complete.
- A block that a running sequence is about to fill is *announced*: whoever needs the same one may wait for it.
- A block may be given away as soon as its sequence is done with it, even if a launched step still reads or writes it:
  whatever the next owner writes is written by a later step, and it reads only positions it wrote itself.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterable

from lorax_backend.scheduler.sequence import Sequence


class BlockManager:
    """Owns the block tables, reference counts and prefix hashes. Not thread-safe: the engine thread's alone.

    Every change has a question to ask first (`can_allocate`, `can_append`); making a change that was not possible
    raises RuntimeError, because it is a bug of the caller.
    """

    def __init__(self, num_blocks: int, block_size: int, prefix_caching: bool = True) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"num_blocks ({num_blocks}) and block_size ({block_size}) must be at least 1")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self._free = list(range(num_blocks - 1, -1, -1))
        self._cached: dict[int, None] = {}  # least recently used first
        self._ref_counts = [0] * num_blocks
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._announced: dict[bytes, int] = {}  # by how many running sequences

    @property
    def num_available(self) -> int:
        """Blocks that could be given to a sequence now: free and cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_available

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def match(self, seq: Sequence) -> list[int]:
        """Blocks that already hold the longest known prefix of `seq`, in order. Changes no accounting.

        The last token is never part of it: its logits are needed, so at least one token must be computed.
        """
        if not self.prefix_caching:
            return []
        limit = (len(seq.token_ids) - 1) // self.block_size
        self._extend_hashes(seq, limit)
        blocks: list[int] = []
        for block_hash in seq.block_hashes[:limit]:
            block = self._block_of.get(block_hash)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def num_coming(self, seq: Sequence, num_matched: int) -> int:
        """How many blocks of the prefix of `seq` follow the `num_matched` that `match` found, and are being computed by
        sequences that run: it finds them when these are done."""
        if not self._announced:
            return 0
        limit = (len(seq.token_ids) - 1) // self.block_size
        coming = 0
        for block_hash in seq.block_hashes[num_matched:limit]:
            if block_hash not in self._announced:
                break
            coming += 1
        return coming

    def can_allocate(self, seq: Sequence, prefix: list[int], reserve: int = 0) -> bool:
        """True if `seq` can have blocks for all its known tokens, beginning with the matched blocks `prefix`, so that
        at least `reserve` blocks stay available."""
        revived = sum(1 for block in prefix if self._ref_counts[block] == 0)
        new = self.blocks_for(len(seq.token_ids)) - len(prefix)
        return new + revived + reserve <= self.num_available

    def allocate(self, seq: Sequence, prefix: list[int]) -> None:
        """Fill the empty block table of `seq` with `prefix` and new blocks for the rest of its known tokens."""
        if seq.block_table or not self.can_allocate(seq, prefix):
            raise RuntimeError(f"sequence {seq.handle}: allocate without room or twice")
        for block in prefix:
            if self._ref_counts[block] == 0:
                del self._cached[block]
            self._ref_counts[block] += 1
        seq.block_table.extend(prefix)
        seq.num_registered = len(prefix)
        self._grow(seq, len(seq.token_ids))
        seq.num_announced = len(seq.block_hashes)
        for block_hash in seq.block_hashes[len(prefix) :]:
            self._announced[block_hash] = self._announced.get(block_hash, 0) + 1

    def can_append(self, seq: Sequence, num_tokens: int) -> bool:
        """True if the block table of `seq` can be made long enough for `num_tokens` tokens."""
        return self.blocks_for(num_tokens) - len(seq.block_table) <= self.num_available

    def append(self, seq: Sequence, num_tokens: int) -> None:
        """Make the block table of `seq` long enough for `num_tokens` tokens in all."""
        if not self.can_append(seq, num_tokens):
            raise RuntimeError(f"sequence {seq.handle}: append without room")
        self._grow(seq, num_tokens)

    def register(self, seq: Sequence) -> None:
        """Offer the full blocks of `seq` for sharing: those whose tokens are known and whose steps are scheduled."""
        full = min(seq.num_computed, len(seq.token_ids)) // self.block_size
        if full <= seq.num_registered:
            return
        if not self.prefix_caching:
            seq.num_registered = full
            return
        self._extend_hashes(seq, full)
        for index in range(seq.num_registered, full):
            block, block_hash = seq.block_table[index], seq.block_hashes[index]
            # A twin computed in the same step keeps a private block: one hash has one block.
            if self._hash_of[block] is None and block_hash not in self._block_of:
                self._hash_of[block] = block_hash
                self._block_of[block_hash] = block
        self._withdraw(seq, full)
        seq.num_registered = full

    def free(self, seq: Sequence) -> None:
        """Take all blocks from `seq`. Shareable ones become cached, the end of the sequence to be evicted first."""
        for block in reversed(seq.block_table):
            if self._ref_counts[block] < 1:
                raise RuntimeError(f"sequence {seq.handle}: block {block} freed twice")
            self._ref_counts[block] -= 1
            if self._ref_counts[block] == 0:
                if self._hash_of[block] is None:
                    self._free.append(block)
                else:
                    self._cached[block] = None
        seq.block_table.clear()
        self._withdraw(seq, seq.num_announced)
        seq.num_registered = seq.num_announced = seq.capacity = 0

    def reset_prefix_cache(self) -> None:
        """Forget every shared prefix. Sequences keep the blocks they use."""
        for block in self._block_of.values():
            self._hash_of[block] = None
        self._block_of.clear()
        self._free.extend(self._cached)
        self._cached.clear()

    def check_integrity(self, sequences: Iterable[Sequence] | None = None) -> None:
        """Check that every block is in exactly one state and, given all `sequences`, that the counts are theirs.

        Raises:
            RuntimeError: naming everything that is wrong.
        """
        problems: list[str] = []
        unused = Counter([*self._free, *self._cached])
        problems += [f"block {block} is listed {n} times" for block, n in unused.items() if n > 1]
        for block, count in enumerate(self._ref_counts):
            if count < 0 or (count == 0) != (block in unused):
                problems.append(
                    f"block {block}: {count} users but {'' if block in unused else 'not '}listed unused"
                )
        for block in range(self.num_blocks):
            block_hash = self._hash_of[block]
            if block_hash is None and block in self._cached:
                problems.append(f"block {block} is cached without a hash")
            if block_hash is not None and self._block_of.get(block_hash) != block:
                problems.append(f"block {block}: hash and table disagree")
        problems += [f"block {b} is free but shared" for b in self._free if self._hash_of[b] is not None]
        if len(self._block_of) != sum(1 for h in self._hash_of if h is not None):
            problems.append("a hash names a block that does not carry it")
        if sequences is not None:
            sequences = list(sequences)
            users = Counter(block for seq in sequences for block in seq.block_table)
            announced = Counter(
                block_hash
                for seq in sequences
                for block_hash in seq.block_hashes[seq.num_registered : seq.num_announced]
            )
            if announced != self._announced:
                problems.append("the announced blocks are not those of the running sequences")
            problems += [
                f"block {block}: {count} users counted, {users[block]} block tables have it"
                for block, count in enumerate(self._ref_counts)
                if users[block] != count
            ]
        if problems:
            raise RuntimeError("KV block accounting is off: " + "; ".join(problems))

    def _grow(self, seq: Sequence, num_tokens: int) -> None:
        for _ in range(self.blocks_for(num_tokens) - len(seq.block_table)):
            if self._free:
                block = self._free.pop()
            else:
                block = next(iter(self._cached))
                del self._cached[block]
                self._forget(block)
            self._ref_counts[block] = 1
            seq.block_table.append(block)
        seq.capacity = len(seq.block_table) * self.block_size

    def _withdraw(self, seq: Sequence, end: int) -> None:
        """The blocks of `seq` before the `end`-th are there, or will not come."""
        for block_hash in seq.block_hashes[seq.num_registered : min(end, seq.num_announced)]:
            if self._announced[block_hash] == 1:
                del self._announced[block_hash]
            else:
                self._announced[block_hash] -= 1

    def _forget(self, block: int) -> None:
        block_hash = self._hash_of[block]
        if block_hash is not None:
            del self._block_of[block_hash]
            self._hash_of[block] = None

    def _extend_hashes(self, seq: Sequence, num_blocks: int) -> None:
        hashes, done = seq.block_hashes, len(seq.block_hashes)
        if done >= num_blocks:
            return
        sha256 = hashlib.sha256
        parent = hashes[-1] if hashes else sha256(seq.cache_key.encode()).digest()
        tokens = array("q", seq.token_ids[done * self.block_size : num_blocks * self.block_size]).tobytes()
        size = 8 * self.block_size
        for begin in range(0, len(tokens), size):
            parent = sha256(parent + tokens[begin : begin + size]).digest()
            hashes.append(parent)
