"""The cache beside a model that remembers what every page holds: any order of calls, tiny pools, shared prefixes."""

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pagedserve_engine.cache.layout import CacheLayout
from pagedserve_engine.cache.manager import CacheManager

SLOTS = 4
MAX_MODEL_LEN = 40
GARBAGE = ("never written",)


@dataclass
class Sequence:
    """What a scheduler knows of a running request."""

    slot: int
    salt: bytes
    tokens: list[int]
    hashes: list[bytes] = field(default_factory=list)
    computed: int = 0


class CacheMachine(RuleBasedStateMachine):
    """Requests over few distinct tokens come, grow, fail and leave; ``pages`` is what the tensors would hold."""

    layer_types = ("sliding", "full", "sliding")

    @initialize(
        window=st.integers(1, 9),
        block_size=st.integers(1, 5),
        num_blocks=st.integers(8, 60),
        prefix_cache=st.sampled_from([True, True, True, False]),
    )
    def build(self, window, block_size, num_blocks, prefix_cache):
        self.block_size, self.window, self.prefix_cache = block_size, window, prefix_cache
        self.layout = CacheLayout.build(
            self.layer_types, window=window, num_kv_heads=1, head_dim=1, block_size=block_size, dtype_bytes=4
        )
        self.cache = CacheManager(
            self.layout,
            num_blocks=num_blocks,
            max_num_seqs=SLOTS,
            max_model_len=MAX_MODEL_LEN,
            prefix_cache=prefix_cache,
        )
        self.pages = {}
        """(block, offset) -> (group, salt, tokens up to and including this one)."""
        self.hashed = {}
        """Chained hash -> (salt, tokens up to the block's end)."""
        self.running = {}
        self.seen = []

    # --- what a scheduler does ---------------------------------------------------------------------------------------

    @precondition(lambda self: len(self.running) < SLOTS)
    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=30), salt=st.sampled_from([b"", b"", b"tenant"]))
    def admit(self, tokens, salt):
        self.enter(tokens, salt)

    @precondition(lambda self: self.seen and len(self.running) < SLOTS)
    @rule(data=st.data(), cut=st.integers(0, 12), tail=st.lists(st.integers(0, 1), min_size=1, max_size=6))
    def admit_what_begins_like_another(self, data, cut, tail):
        known = data.draw(st.sampled_from(self.seen))
        prefix = known.tokens[: len(known.tokens) - cut]
        self.enter([*prefix, *tail][:MAX_MODEL_LEN], known.salt)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), chunk=st.integers(1, 12), sampled=st.integers(0, 1))
    def step(self, data, chunk, sampled):
        sequence = self.pick(data)
        start = sequence.computed
        if self.schedule(sequence, chunk):
            self.compute(sequence, start)
            if sequence.computed == len(sequence.tokens) < MAX_MODEL_LEN:
                sequence.tokens.append(sampled)

    @precondition(lambda self: 0 < len(self.running) < SLOTS)
    @rule(data=st.data(), chunk=st.integers(1, 12))
    def step_with_a_hit_on_what_it_fills(self, data, chunk):
        first = self.pick(data)
        start = first.computed
        if not self.schedule(first, chunk):
            return
        other = self.enter(first.tokens, first.salt)
        other_start = other.computed
        scheduled = self.schedule(other, chunk)
        self.write(first, start)
        if scheduled:
            self.write(other, other_start)
            self.read(other, other_start)
        self.read(first, start)

    @precondition(lambda self: 0 < len(self.running) < SLOTS)
    @rule(data=st.data(), chunk=st.integers(1, 12))
    def step_that_fails(self, data, chunk):
        first = self.pick(data)
        start = first.computed
        if not self.schedule(first, chunk):
            return
        other = self.enter(first.tokens, first.salt)
        other_start = other.computed
        self.schedule(other, chunk)
        for sequence, context in ((first, start), (other, other_start)):
            self.cache.discard(sequence.slot, context // self.block_size)
            del self.running[sequence.slot]

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def release(self, data):
        sequence = self.pick(data)
        self.cache.release(sequence.slot)
        del self.running[sequence.slot]
        assert self.cache.capacity[sequence.slot] == 0

    @rule(count=st.none() | st.integers(0, 3))
    def evict(self, count):
        before = self.cache.num_cached
        assert self.cache.evict_cached(count) == (before if count is None else min(count, before))

    # --- what must hold ----------------------------------------------------------------------------------------------

    @invariant()
    def books_balance(self):
        self.cache.check()
        assert self.cache.num_free + self.cache.num_referenced == self.cache.num_total

    @invariant()
    def what_can_be_found_holds_what_its_hash_says(self):
        for (group, block_hash), block in self.cache._pool._block_of.items():
            salt, tokens = self.hashed[block_hash]
            for offset in range(self.block_size):
                end = len(tokens) - self.block_size + offset + 1
                assert self.pages[block, offset] == (group, salt, tokens[:end])

    @invariant()
    def a_shared_block_has_one_content(self):
        holders = {}
        for sequence in self.running.values():
            for group, table in enumerate(self.cache.block_tables):
                for position in np.flatnonzero(table[sequence.slot]).tolist():
                    prefix = tuple(sequence.tokens[: (position + 1) * self.block_size])
                    block = int(table[sequence.slot, position])
                    assert holders.setdefault(block, (group, sequence.salt, prefix)) == (group, sequence.salt, prefix)

    def teardown(self):
        if not hasattr(self, "cache"):
            return
        for slot in list(self.running):
            self.cache.release(slot)
        self.cache.check()
        assert self.cache.num_free == self.cache.num_total
        self.cache.evict_cached()
        assert (self.cache.num_cached, self.cache._pool._block_of) == (0, {})

    # --- steps of the rules ------------------------------------------------------------------------------------------

    def pick(self, data):
        return self.running[data.draw(st.sampled_from(sorted(self.running)))]

    def enter(self, tokens, salt):
        """Admit a request; its hit must be as long as the model's pages allow, and cost what was announced."""
        slot = next(slot for slot in range(SLOTS) if slot not in self.running)
        sequence = Sequence(slot, salt, list(tokens))
        self.hash(sequence)
        sequence.computed = self.cache.match(sequence.hashes, len(tokens))
        assert sequence.computed % self.block_size == 0
        assert sequence.computed < len(tokens)
        assert sequence.computed == self.longest_hit(sequence)
        announced = self.cache.can_admit(sequence.hashes, sequence.computed, len(tokens))
        free = self.cache.num_free
        self.cache.admit(slot, sequence.hashes, sequence.computed)
        assert self.cache.capacity[slot] == sequence.computed
        if self.cache.grow(slot, len(tokens)):
            assert free - self.cache.num_free == announced
        else:
            assert announced > free
        self.running[slot] = sequence
        self.seen.append(sequence)
        return sequence

    def longest_hit(self, sequence):
        found = self.cache._pool._block_of
        if not self.prefix_cache:
            return 0
        for blocks in range((len(sequence.tokens) - 1) // self.block_size, 0, -1):
            reads = {None: 0, self.window: max(0, blocks * self.block_size - self.window + 1) // self.block_size}
            if all(
                (group.index, sequence.hashes[block]) in found
                for group in self.layout.groups
                for block in range(reads[group.window], blocks)
            ):
                return blocks * self.block_size
        return 0

    def hash(self, sequence):
        self.cache.hash_blocks(sequence.tokens, sequence.hashes, sequence.salt)
        for index, block_hash in enumerate(sequence.hashes):
            content = (sequence.salt, tuple(sequence.tokens[: (index + 1) * self.block_size]))
            assert self.hashed.setdefault(block_hash, content) == content

    def schedule(self, sequence, chunk):
        """Trim, hold and seal the next ``chunk`` tokens; the blocks that they fill hold garbage until written."""
        slots, computed = np.array([sequence.slot], np.int32), np.array([sequence.computed], np.int32)
        free = self.cache.num_free
        due = bool(self.cache.trim_due(slots, computed)[0])
        self.cache.trim(sequence.slot, sequence.computed)
        assert due or self.cache.num_free == free
        start, stop = sequence.computed, min(sequence.computed + chunk, len(sequence.tokens))
        if start == stop or not self.cache.grow(sequence.slot, stop):
            return False
        assert self.cache.capacity[sequence.slot] >= stop
        for allocator in self.cache.allocators:
            for page in allocator.get_write_indices(sequence.slot, start, stop).tolist():
                assert page >= self.block_size, "a write into the null block"
                self.pages[divmod(page, self.block_size)] = GARBAGE
        self.hash(sequence)
        self.cache.seal(sequence.slot, sequence.hashes, start // self.block_size, stop // self.block_size)
        sequence.computed = stop
        return True

    def compute(self, sequence, start):
        self.write(sequence, start)
        self.read(sequence, start)

    def write(self, sequence, start):
        for group, allocator in enumerate(self.cache.allocators):
            pages = allocator.get_write_indices(sequence.slot, start, sequence.computed).tolist()
            for position, page in enumerate(pages, start):
                self.pages[divmod(page, self.block_size)] = self.content(sequence, group, position)

    def read(self, sequence, start):
        """Every key that the step's queries see is the right one."""
        stop = sequence.computed
        for group, allocator in enumerate(self.cache.allocators):
            window = self.layout.groups[group].window
            first = 0 if window is None else max(0, start - window + 1)
            pages = allocator.get_read_indices(sequence.slot, stop, stop - start).tolist()
            held = [self.pages[divmod(page, self.block_size)] for page in pages]
            assert held == [self.content(sequence, group, position) for position in range(first, stop)]

    @staticmethod
    def content(sequence, group, position):
        return group, sequence.salt, tuple(sequence.tokens[: position + 1])


class FullCacheMachine(CacheMachine):
    layer_types = ("full", "full")


class SlidingCacheMachine(CacheMachine):
    layer_types = ("sliding", "sliding")


@pytest.mark.parametrize("machine", [CacheMachine, FullCacheMachine, SlidingCacheMachine])
def test_any_order_of_calls_keeps_every_page_right(machine):
    case = machine.TestCase()
    case.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
    case.runTest()
