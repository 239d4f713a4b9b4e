import dataclasses
import random

import numpy as np
import pytest

from jpaged.block_manager import BlockManager
from jpaged.compile_plan import step_shapes
from jpaged.config import SchedulerConfig
from jpaged.input_batch import (
    ALIGNMENT,
    NO_TOKEN,
    NUM_BUFFERS,
    PENDING_TOKEN,
    InputBatch,
    packed_size,
    unpack,
)
from jpaged.request import Request
from jpaged.sampling_params import SamplingParams
from jpaged.sampling_rows import NUM_COLUMNS
from jpaged.scheduler import Scheduler

SIZE, MAX_LEN, MAX_SEQS, MAX_TOKENS = 4, 40, 5, 16
MAX_BLOCKS = MAX_LEN // SIZE
SHAPES = step_shapes(MAX_TOKENS, MAX_SEQS)


class Bench:
    """A real scheduler and block manager, and the batch that is filled from what they decide."""

    def __init__(self, num_blocks=60, seed=0):
        self.random = random.Random(seed)
        self.num_blocks = num_blocks
        self.manager = BlockManager(num_blocks, SIZE)
        self.scheduler = Scheduler(
            SchedulerConfig(
                max_model_len=MAX_LEN, max_num_seqs=MAX_SEQS, max_num_batched_tokens=MAX_TOKENS
            ),
            self.manager,
        )
        self.batch = InputBatch(
            MAX_SEQS,
            MAX_BLOCKS,
            SIZE,
            num_blocks,
            max(packed_size(shape, MAX_BLOCKS) for shape in SHAPES),
        )
        self.rows = {}
        self.in_flight = []
        self.num_requests = 0

    def add(self, num_prompt, max_tokens=8, n=1):
        prompt = [self.random.randrange(1, 100) for _ in range(num_prompt)]
        params = SamplingParams(n=n, max_tokens=max_tokens)
        request = Request(str(self.num_requests), prompt, params)
        self.num_requests += 1
        self.scheduler.add_request(request)
        return request

    def schedule(self):
        scheduled = self.scheduler.schedule()
        for seq in scheduled.admitted:
            row = np.arange(NUM_COLUMNS, dtype=np.int32) + 100 * (1 + self.num_requests)
            row[0] = self.random.randrange(1000)
            self.rows[seq] = row
            assert seq.row is not None
            self.batch.set_row(seq.row, row)
        return scheduled

    def fill(self, scheduled, shape, bans_of=lambda seq: (), wants=lambda seq: False):
        return unpack(self.batch.fill(scheduled, shape, bans_of, wants), shape, MAX_BLOCKS)

    def finish_step(self, scheduled):
        """The step's tokens arrive, one step late as in the engine."""
        self.in_flight.append(scheduled)
        while len(self.in_flight) > (0 if scheduled.is_empty else 1):
            done = self.in_flight.pop(0)
            for seq, samples in zip(done.seqs, done.samples, strict=True):
                if (
                    samples
                    and self.scheduler.append_token(seq, self.random.randrange(1, 100))
                    and len(seq.token_ids) >= seq.max_length
                ):
                    self.scheduler.finish_sequence(seq, "length")


def _smallest(scheduled):
    num_seqs = len(scheduled.seqs)
    decode_only = scheduled.num_decodes == num_seqs
    return min(s for s in SHAPES if s.holds(scheduled.num_batched_tokens, num_seqs, decode_only))


def _expect(bench, scheduled, shape, arrays, bans_of, wants):
    """Compares with what each field means, token by token."""
    at = 0
    for i, seq in enumerate(scheduled.seqs):
        start, count = scheduled.starts[i], scheduled.num_scheduled_tokens[i]
        assert arrays.query_start_loc[i] == at
        assert arrays.seq_lens[i] == start + count
        assert arrays.rows[i] == seq.row
        assert arrays.samples[i] == scheduled.samples[i]
        assert count == 1 or i >= scheduled.num_decodes
        assert count or scheduled.samples[i], "a row without tokens is there to sample"
        np.testing.assert_array_equal(arrays.sampling_rows[i], bench.rows[seq])
        np.testing.assert_array_equal(
            arrays.block_tables[i, : len(seq.block_ids)], np.asarray(seq.block_ids, np.int32)
        )
        assert len(seq.block_ids) * SIZE >= start + count
        prompt = seq.request.prompt_token_ids
        for position in range(start, start + count):
            known = position < len(seq.token_ids)
            assert known != scheduled.uses_pending[i]
            token = seq.token_ids[position] if known else PENDING_TOKEN
            assert arrays.token_ids[at] == token
            assert arrays.positions[at] == position
            slot = seq.block_ids[position // SIZE] * SIZE + position % SIZE
            assert arrays.slot_mapping[at] == slot
            asked = wants(seq) and position + 1 < len(prompt)
            assert arrays.next_token_ids[at] == (prompt[position + 1] if asked else NO_TOKEN)
            at += 1
        bans = list(bans_of(seq)) if scheduled.samples[i] else []
        tokens = arrays.ban_tokens[i].tolist()
        assert tokens == [token for token, _ in bans] + [-1] * (len(tokens) - len(bans))
        assert arrays.ban_if_last[i, : len(bans)].tolist() == [last for _, last in bans]
    num_seqs, num_copies = len(scheduled.seqs), len(scheduled.block_copies)
    pairs = zip(arrays.copy_sources.tolist(), arrays.copy_destinations.tolist(), strict=True)
    assert list(pairs) == scheduled.block_copies + [(0, 0)] * (shape.num_seqs - num_copies)
    assert at == scheduled.num_batched_tokens
    assert (arrays.query_start_loc[num_seqs:] == at).all(), "padding rows have no tokens"
    assert (arrays.next_token_ids[at:] == NO_TOKEN).all()
    for name in ("token_ids", "positions", "slot_mapping"):
        assert not getattr(arrays, name)[at:].any(), "padding writes into the null block"
    for name in ("seq_lens", "rows", "samples", "block_tables"):
        assert not getattr(arrays, name)[num_seqs:].any(), name
    assert (arrays.ban_tokens[num_seqs:] == -1).all()
    assert arrays.token_ids.shape == (shape.num_tokens,)
    assert arrays.seq_lens.shape == (shape.num_seqs,)


@pytest.mark.parametrize("num_blocks", [200, 14])
@pytest.mark.parametrize("seed", range(4))
def test_fields_mean_what_they_say_for_whatever_is_scheduled(seed, num_blocks):
    bench = Bench(num_blocks, seed)
    choose = bench.random

    def wants(seq):
        return int(seq.request.request_id) % 2 == 0

    def bans_of(seq):
        return [(k, k - 1) for k in range((len(seq.token_ids) + seq.seq_index) % 4)]

    num_steps = num_copies = 0
    while bench.num_requests < 25 or bench.scheduler.has_unfinished() or bench.in_flight:
        if bench.num_requests < 25 and choose.random() < 0.8:
            bench.add(choose.randrange(1, 19), choose.randrange(1, 8), choose.choice([1, 1, 1, 2]))
        scheduled = bench.schedule()
        if not scheduled.is_empty:
            # Not always the smallest: the cheapest compiled one may be larger.
            fitting = [s for s in SHAPES if s >= _smallest(scheduled) and not s.decode_only]
            shape = choose.choice([_smallest(scheduled), fitting[-1]])
            arrays = bench.fill(scheduled, shape, bans_of, wants)
            _expect(bench, scheduled, shape, arrays, bans_of, wants)
            num_steps += 1
            num_copies += len(scheduled.block_copies)
        bench.finish_step(scheduled)
    assert num_steps > 30
    assert num_copies > 0
    assert (bench.scheduler.num_preemptions > 0) == (num_blocks == 14), "a small pool preempts"


def test_a_single_token_chunk_among_decodes_is_asked_for_its_next_token():
    bench = Bench()
    request = bench.add(17)
    scheduled = bench.schedule()
    assert scheduled.num_scheduled_tokens == [16]
    bench.fill(scheduled, _smallest(scheduled))
    scheduled = bench.schedule()
    assert (scheduled.num_decodes, scheduled.num_scheduled_tokens) == (1, [1])
    arrays = bench.fill(scheduled, _smallest(scheduled), wants=lambda seq: True)
    assert arrays.token_ids[0] == request.prompt_token_ids[16]
    assert arrays.next_token_ids[0] == NO_TOKEN, "nothing known follows the prompt's last token"


def test_buffers_are_used_in_turn():
    bench = Bench()
    bench.add(3, max_tokens=20)
    filled, copies = [], []
    for _ in range(2 * NUM_BUFFERS):
        scheduled = bench.schedule()
        packed = bench.batch.fill(
            scheduled, _smallest(scheduled), lambda seq: (), lambda seq: False
        )
        for earlier, copy in zip(
            filled[-NUM_BUFFERS + 1 :], copies[-NUM_BUFFERS + 1 :], strict=True
        ):
            np.testing.assert_array_equal(earlier, copy, "a step in flight may still read it")
            assert not np.shares_memory(earlier, packed)
        filled.append(packed)
        copies.append(packed.copy())
        bench.finish_step(scheduled)
    assert np.shares_memory(filled[0], filled[NUM_BUFFERS])


@pytest.mark.parametrize("block_id", [60, 10**6, -1, 0])
def test_a_block_outside_the_pool_is_an_error(block_id):
    bench = Bench(num_blocks=60)
    request = bench.add(9)
    scheduled = bench.schedule()
    request.sequences[0].block_ids[1] = block_id
    with pytest.raises(RuntimeError, match=r"names a block outside \[1, 59\]"):
        bench.fill(scheduled, _smallest(scheduled))


@pytest.mark.parametrize("pair", [(60, 5), (5, 60), (-1, 5), (5, 0)])
def test_a_copy_outside_the_pool_is_an_error(pair):
    bench = Bench(num_blocks=60)
    bench.add(9)
    scheduled = dataclasses.replace(bench.schedule(), block_copies=[pair])
    with pytest.raises(RuntimeError, match=r"a copy names a block outside \[1, 59\]"):
        bench.fill(scheduled, _smallest(scheduled))


def test_more_copies_than_the_program_makes_are_an_error():
    bench = Bench()
    bench.add(9)
    scheduled = dataclasses.replace(bench.schedule(), block_copies=[(1, 2)])
    plain = dataclasses.replace(_smallest(scheduled), plain=True)
    with pytest.raises(RuntimeError, match=r"program makes 0 block copies, got \[\(1, 2\)\]"):
        bench.fill(scheduled, plain)


def test_a_row_is_taken_over_whole():
    bench = Bench()
    first = bench.add(30, max_tokens=1)
    while bench.scheduler.has_unfinished():
        scheduled = bench.schedule()
        if not scheduled.is_empty:
            bench.fill(scheduled, _smallest(scheduled))
        bench.finish_step(scheduled)
    assert first.is_finished
    second = bench.add(2)
    scheduled = bench.schedule()
    arrays = bench.fill(scheduled, _smallest(scheduled))
    (block_id,) = second.sequences[0].block_ids
    assert arrays.block_tables[0, 0] == block_id
    assert arrays.slot_mapping[:2].tolist() == [block_id * SIZE, block_id * SIZE + 1]


PLAIN = dataclasses.replace(SHAPES[0], plain=True)


@pytest.mark.parametrize("shape", [*SHAPES, PLAIN], ids=lambda shape: shape.name)
def test_fields_lie_aligned_and_without_overlap(shape):
    size = packed_size(shape, MAX_BLOCKS)
    arrays = unpack(np.arange(size), shape, MAX_BLOCKS)
    end = 0
    for name in arrays.__slots__:
        values = getattr(arrays, name).ravel()
        if name.startswith(("copy_", "ban_")) and shape.plain:
            assert not len(values)
            continue
        if name.startswith("copy_"):
            assert len(values) == shape.num_seqs
        assert end <= values[0] < end + ALIGNMENT
        assert values[0] % ALIGNMENT == 0
        np.testing.assert_array_equal(values, np.arange(values[0], values[0] + values.size))
        end = int(values[-1]) + 1
    assert end == size
    assert arrays.block_tables.shape == (shape.num_seqs, MAX_BLOCKS)
    assert arrays.query_start_loc.shape == (shape.num_seqs + 1,)
