"""The scheduler under random interleavings, on a simulated device that checks what steps read.

The device keeps in each slot what K and V depend on, all tokens so far (as a hash), block tables a
row as a runner does (updated only from `table_updates`), the last sampled token of each row, and
the host's blocks. It runs a step when it is scheduled; the host learns the tokens later. So
everything that asynchronous stepping, sharing, swapping or reuse may get wrong shows as a slot that
holds what it should not: in what a step reads, and after each step in what the tables of all
running sequences lead to.
"""

import dataclasses
import random

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from jpaged.beam_outputs import BeamGroup
from jpaged.beam_search import BeamSearch
from jpaged.block_manager import BlockManager
from jpaged.config import PreemptionMode, SchedulerConfig
from jpaged.preemption import PreemptionPolicy
from jpaged.request import Request, Sequence
from jpaged.sampling_params import SamplingParams
from jpaged.scheduler import Scheduler
from jpaged.scheduler_output import SchedulerOutput

BLOCK_SIZE = 4
MAX_MODEL_LEN = 40
EOS = 9

BEAM_CANDIDATES = 6  # of five beams and one end token

Sampled = list[tuple[Sequence, "int | Candidates"]]


@dataclasses.dataclass(frozen=True)
class Candidates:
    """What a step says of a beam: its likeliest tokens, a function of those before."""

    top_token_ids: np.ndarray
    top_logprobs: np.ndarray
    logprob: float = 0.0
    rank: int = 1

    @classmethod
    def after(cls, token_ids: list[int]) -> "Candidates":
        rng = random.Random(hash(tuple(token_ids)))
        tokens = rng.sample([0, 1, 2, 3, 4, 5, EOS], BEAM_CANDIDATES)
        logprobs = sorted((-rng.random() * 4 for _ in tokens), reverse=True)
        return cls(np.array(tokens, np.int32), np.array(logprobs, np.float32))


def search_alone(request: Request, max_tokens: int) -> list[list[int]]:
    """What the beam search of a request finds without a scheduler."""
    width = len(request.sequences)
    search = BeamSearch(beam_width=width, max_tokens=max_tokens, end_token_ids=[EOS])
    beams = [request.prompt_token_ids]
    while not search.is_done:
        found = [Candidates.after(beam) for beam in beams]
        chosen = search.advance(
            np.stack([candidates.top_token_ids for candidates in found]),
            np.stack([candidates.top_logprobs for candidates in found]),
        )
        beams = [[*beams[parent], token] for parent, token in chosen]
    return [hypothesis.token_ids for hypothesis in search.results(width)]


def contents(token_ids: list[int]) -> list[int]:
    """What a sequence's slots hold, in order."""
    hashes, last = [], 0
    for token in token_ids:
        last = hash((last, token))
        hashes.append(last)
    return hashes


class SimulatedDevice:
    """Runs steps in order on a pool of tokens; checks the scheduler's output on the way."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.memory: dict[int, int | None] = {}
        self.host_memory: dict[int, list[int | None]] = {}
        self.num_copies = 0
        self.num_forks = 0
        self.tables: dict[int, list[int]] = {}
        self.last_tokens: dict[int, int] = {}
        self.owners: dict[int, Sequence] = {}
        # Every token of a sequence, also those the host has not read.
        self.tokens: dict[Sequence, list[int]] = {}

    def run(self, output: SchedulerOutput) -> Sampled:
        for seq in output.preempted:
            assert seq.row is None
            assert seq not in output.seqs
        assert not (output.preempted and output.admitted)
        for seq in output.admitted:
            assert seq.row is not None
            self.owners[seq.row] = seq
            self.tables[seq.row] = []
            # What it had sampled but not told the host when it was preempted has arrived since.
            assert self.tokens.setdefault(seq, list(seq.token_ids)) == seq.token_ids
        for seq, first in output.table_updates:
            assert seq.row is not None
            table = self.tables[seq.row]
            assert len(table) >= first
            table[first:] = seq.block_ids[first:]
        # A step without sequences is never dispatched, so nothing but its swaps may matter.
        assert output.seqs or not (output.admitted or output.table_updates or output.block_copies)
        self.swap(output)
        self.copy(output)
        return self.step(output)

    def swap(self, output: SchedulerOutput) -> None:
        """Copies blocks to the host, and then others from there."""
        pool = self.scheduler.block_manager.pool
        assert len({block_id for _, block_id in output.swap_ins}) == len(output.swap_ins)
        for block_id, place in output.swap_outs:
            assert 0 < block_id < pool.num_blocks
            assert place > 0
            self.host_memory[place] = [self.memory.get(slot) for slot in self.slots(block_id)]
        for place, block_id in output.swap_ins:
            assert 0 < block_id < pool.num_blocks
            for slot, content in zip(self.slots(block_id), self.host_memory[place], strict=True):
                self.memory[slot] = content

    def held(self, seq: Sequence) -> list[int | None]:
        """What a sequence's blocks hold of its computed tokens, wherever they are."""
        if seq.host_block_ids:
            found = [content for place in seq.host_block_ids for content in self.host_memory[place]]
        else:
            slots = (slot for block_id in seq.block_ids for slot in self.slots(block_id))
            found = [self.memory.get(slot) for slot in slots]
        return found[: seq.num_computed_tokens]

    def copy(self, output: SchedulerOutput) -> None:
        """Runs the step's block copies: all are read before any is written."""
        copies = output.block_copies
        assert len(copies) <= len(output.seqs)
        assert len({dst for _, dst in copies}) == len(copies)
        assert all(src > 0 and dst > 0 for src, dst in copies), "the null block is copied"
        blocks = {dst: [self.memory.get(slot) for slot in self.slots(src)] for src, dst in copies}
        for dst, held in blocks.items():
            for slot, content in zip(self.slots(dst), held, strict=True):
                self.memory[slot] = content
        self.num_copies += len(copies)

    def step(self, output: SchedulerOutput) -> Sampled:
        sampled: Sampled = []
        reads: list[tuple[Sequence, list[int], int]] = []
        written: set[int] = set()
        forked_from: tuple[Request, int] | None = None
        for seq, start, num_tokens, samples, uses_pending in zip(
            output.seqs,
            output.starts,
            output.num_scheduled_tokens,
            output.samples,
            output.uses_pending,
            strict=True,
        ):
            row = seq.row
            assert row is not None
            assert self.owners[row] is seq
            if num_tokens == 0:
                # It forks: the sequences before it, up to one of tokens, computed what it has.
                assert (samples, uses_pending) == (True, False)
                assert forked_from == (seq.request, start)
                self.num_forks += 1
            else:
                forked_from = (seq.request, start + num_tokens)
            table, end = self.tables[row], start + num_tokens
            assert table == seq.block_ids
            if uses_pending:
                assert not seq.request.awaits_tokens
                assert (num_tokens, len(seq.token_ids) <= start) == (1, True)
                inputs = [self.last_tokens[row]]
            else:
                inputs = seq.token_ids[start:end]
            assert inputs == self.tokens[seq][start:end]
            for position, content in enumerate(contents(self.tokens[seq][:end])):
                if position < start:
                    continue
                slot = self.slot(table, position)
                assert slot not in written
                assert slot >= BLOCK_SIZE, "the null block is written"
                written.add(slot)
                self.memory[slot] = content
            reads.append((seq, table, end))
            if samples:
                assert end == len(self.tokens[seq])
                assert end < seq.max_length
                if seq.request.is_beam_search:
                    assert not uses_pending
                    sampled.append((seq, Candidates.after(self.tokens[seq])))
                    continue
                token = self.sample(seq)
                self.tokens[seq].append(token)
                self.last_tokens[row] = token
                sampled.append((seq, token))
        # All writes of a layer come before its attention.
        for seq, table, end in reads:
            self.check_contents(seq, table, end)
        return sampled

    def check_contents(self, seq: Sequence, table: list[int], num_tokens: int) -> None:
        context = [self.memory.get(self.slot(table, i)) for i in range(num_tokens)]
        assert context == contents(self.tokens[seq][:num_tokens])

    def check(self) -> None:
        """All that is computed of the running sequences is where their tables say."""
        for row, seq in self.owners.items():
            if seq.row == row:
                # The table of a beam that has moved goes with its next step.
                assert seq.has_new_table or self.tables[row] == seq.block_ids
                self.check_contents(seq, seq.block_ids, seq.num_computed_tokens)

    def sample(self, seq: Sequence) -> int:
        """A function of the tokens so far, of few values, so that blocks often repeat."""
        tokens = self.tokens[seq]
        mix = sum(tokens[-3:]) + len(tokens) // 3 + seq.seq_index * (len(tokens) % 5 == 0)
        return EOS if mix % 17 == 16 else mix % 2

    @staticmethod
    def slots(block_id: int) -> range:
        return range(block_id * BLOCK_SIZE, (block_id + 1) * BLOCK_SIZE)

    @staticmethod
    def slot(table: list[int], position: int) -> int:
        return table[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE


class Run:
    """A scheduler, its device, and the results not read yet."""

    def __init__(
        self,
        num_blocks: int,
        caching: bool,
        mode: PreemptionMode = "recompute",
        num_host_blocks: int = 0,
        host_cache: bool = False,
        **config,
    ) -> None:
        self.scheduler = Scheduler(
            SchedulerConfig(max_model_len=MAX_MODEL_LEN, **config),
            BlockManager(
                num_blocks,
                BLOCK_SIZE,
                caching,
                num_host_blocks=num_host_blocks,
                host_cache=host_cache and caching,
            ),
            PreemptionPolicy(mode),
        )
        self.device = SimulatedDevice(self.scheduler)
        self.unread: list[Sampled] = []
        self.requests: list[Request] = []
        self.searches: dict[Request, BeamGroup] = {}
        self.num_added = 0
        self.num_searched = 0

    def add(
        self,
        num_prompt_tokens: int,
        max_tokens: int,
        n: int,
        priority: int = 0,
        salt: str | None = None,
        skip_cache: bool = False,
        beams: bool = False,
        awaits_tokens: bool = False,
    ) -> None:
        prompt = [i % 2 for i in range(num_prompt_tokens)]
        params = SamplingParams(n=n, max_tokens=max_tokens)
        if beams:
            params = SamplingParams(n=n, max_tokens=max_tokens, use_beam_search=True, temperature=0)
        request = Request(
            f"r{self.num_added}",
            prompt,
            params,
            priority=priority,
            cache_salt=salt,
            skip_prefix_cache=skip_cache,
            eos_token_ids=(EOS,),
            is_beam_search=beams,
            awaits_tokens=awaits_tokens and not beams,
        )
        self.num_added += 1
        try:
            self.scheduler.add_request(request)
        except ValueError:
            manager = self.scheduler.block_manager
            length = min(num_prompt_tokens + max_tokens, MAX_MODEL_LEN) - 1
            shared = num_prompt_tokens // BLOCK_SIZE
            num_blocks = shared + n * (manager.num_blocks_for(length) - shared)
            assert num_blocks > manager.num_usable_blocks or n > self.scheduler.config.max_num_seqs
            return
        self.requests.append(request)
        if beams:
            max_tokens = min(max_tokens, MAX_MODEL_LEN - num_prompt_tokens)
            self.searches[request] = BeamGroup(
                request, params, max_tokens=max_tokens, num_logprobs=BEAM_CANDIDATES
            )

    def schedule(self) -> None:
        scheduler = self.scheduler
        # A sequence whose last token is sampled waits to hear of it.
        free_to_run = {
            seq
            for request in scheduler._running
            for seq in request.unfinished
            if seq.length < seq.max_length and not (request.awaits_tokens and seq.num_pending)
        }
        output = scheduler.schedule()
        for request in {seq.request for seq in output.preempted if seq.request.is_beam_search}:
            self.settle(request)
        assert output.num_batched_tokens <= scheduler.config.max_num_batched_tokens
        scheduled = set(output.seqs)
        assert len(scheduled) == len(output.seqs)
        if scheduler._running:
            candidates = free_to_run.intersection(scheduler._running[0].unfinished)
            assert not candidates or candidates & scheduled, "the first request does not progress"
        self.unread.append(self.device.run(output))

    def read(self) -> None:
        brought = self.unread.pop(0)
        for seq, candidates in brought:
            if isinstance(candidates, Candidates) and not seq.is_finished:
                self.searches[seq.request].take(seq, candidates)
        for request in {seq.request for seq, _ in brought if seq.request.is_beam_search}:
            if not request.is_finished:
                self.settle(request)
        for seq, token in brought:
            if isinstance(token, Candidates):
                continue
            was_finished = seq.is_finished
            assert self.scheduler.append_token(seq, token) is not was_finished
            if was_finished:
                continue
            if token == EOS:
                self.scheduler.finish_sequence(seq, "stop", stop_reason=EOS)
            elif len(seq.token_ids) >= seq.max_length:
                self.scheduler.finish_sequence(seq, "length")

    def settle(self, request: Request) -> None:
        search = self.searches[request]
        if search.settle(self.scheduler):
            assert request.is_finished
            found = [hypothesis.token_ids for hypothesis in search.search.results(99)]
            max_tokens = request.sampling_params.max_tokens or 0
            max_tokens = min(max_tokens, MAX_MODEL_LEN - len(request.prompt_token_ids))
            assert found == search_alone(request, max_tokens)
            self.num_searched += 1
        for seq in request.unfinished:
            self.device.tokens[seq] = list(seq.token_ids)

    def check(self) -> None:
        self.scheduler.check_invariants()
        self.device.check()
        for request in self.requests:
            for seq in request.sequences:
                tokens = self.device.tokens.get(seq, seq.token_ids)
                assert seq.token_ids == tokens[: len(seq.token_ids)]
                assert self.device.held(seq) == contents(tokens[: seq.num_computed_tokens])
                assert len(seq.token_ids) <= seq.max_length or not seq.max_length

    def finish(self) -> None:
        """Steps as the engine does, one result late, until everything has ended."""
        # The first request runs alone at worst, a token a step after its prompt.
        bound = 20 + sum(
            6 * MAX_MODEL_LEN
            if request.is_beam_search or request.awaits_tokens
            else 3 * seq.max_length
            for request in self.requests
            for seq in request.unfinished
        )
        for _ in range(bound):
            if not self.scheduler.has_unfinished():
                break
            self.schedule()
            while len(self.unread) > 1:
                self.read()
            self.check()
        assert not self.scheduler.has_unfinished(), "a request does not end"
        while self.unread:
            self.read()
        self.check()
        stats = self.scheduler.stats()
        assert (stats.blocks.used, stats.num_running_seqs, stats.num_waiting) == (0, 0, 0)
        assert (stats.blocks.host_used, stats.num_swapped) == (0, 0)
        assert all(seq.finish_reason for request in self.requests for seq in request.sequences)


class SchedulerMachine(RuleBasedStateMachine):
    run: Run

    @initialize(
        num_blocks=st.integers(8, 26),
        caching=st.booleans(),
        max_num_seqs=st.integers(1, 6),
        extra_budget=st.integers(0, 20),
        threshold=st.sampled_from([0, 0, 3]),
        policy=st.sampled_from(["fcfs", "priority"]),
        watermark=st.sampled_from([0.0, 0.1]),
        mode=st.sampled_from(["recompute", "swap", "auto"]),
        num_host_blocks=st.sampled_from([0, 3, 8, 40]),
        host_cache=st.booleans(),
    )
    def start(
        self,
        num_blocks,
        caching,
        max_num_seqs,
        extra_budget,
        threshold,
        policy,
        watermark,
        mode,
        num_host_blocks,
        host_cache,
    ) -> None:
        self.run = Run(
            num_blocks,
            caching,
            mode,
            num_host_blocks,
            host_cache,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_seqs + extra_budget,
            long_prefill_token_threshold=threshold,
            policy=policy,
            admission_watermark=watermark,
        )

    @rule(
        num_prompt_tokens=st.integers(1, 20),
        max_tokens=st.integers(1, 14),
        n=st.sampled_from([1, 1, 2, 3, 5]),
        priority=st.integers(0, 2),
        salt=st.sampled_from([None, None, None, "a"]),
        skip_cache=st.sampled_from([False, False, True]),
        kind=st.sampled_from(["plain", "beams", "awaits"]),
    )
    def add(self, num_prompt_tokens, max_tokens, n, priority, salt, skip_cache, kind) -> None:
        beams = kind == "beams" and n > 1
        request = (num_prompt_tokens, max_tokens, n, priority, salt, skip_cache, beams)
        self.run.add(*request, awaits_tokens=kind == "awaits")

    @precondition(lambda self: len(self.run.unread) < 3)
    @rule()
    def schedule(self) -> None:
        self.run.schedule()

    @precondition(lambda self: self.run.unread)
    @rule()
    def read(self) -> None:
        self.run.read()

    @rule(num_steps=st.integers(1, 8), depth=st.integers(0, 1))
    def step(self, num_steps: int, depth: int) -> None:
        for _ in range(num_steps):
            self.run.schedule()
            while len(self.run.unread) > depth:
                self.run.read()

    @rule(seconds_per_block=st.sampled_from([0.1, 10.0]))
    def measure(self, seconds_per_block: float) -> None:
        self.run.scheduler.preemption.note_copies(1, seconds_per_block)
        self.run.scheduler.preemption.note_prefill(1, 1.0)

    @precondition(lambda self: self.run.requests)
    @rule(number=st.integers(0, 99))
    def abort(self, number: int) -> None:
        request = self.run.requests[number % len(self.run.requests)]
        is_unfinished = not request.is_finished
        assert self.run.scheduler.abort_request(request.request_id) is is_unfinished

    @rule(number=st.integers(0, 99))
    def stop(self, number: int) -> None:
        requests = [request for request in self.run.requests if not request.is_beam_search]
        seqs = [seq for request in requests for seq in request.unfinished]
        if seqs:
            assert self.run.scheduler.finish_sequence(seqs[number % len(seqs)], "stop")

    @invariant()
    def nothing_is_broken(self) -> None:
        self.run.check()

    def teardown(self) -> None:
        if hasattr(self, "run"):
            self.run.finish()


# 200,000 steps of the machine, each of which may fork, append, copy, swap, evict, preempt, prune.
TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(
    max_examples=5000, stateful_step_count=40, deadline=None, derandomize=True, database=None
)


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize(
    ("mode", "num_host_blocks", "host_cache"),
    [("recompute", 0, False), ("swap", 60, False), ("swap", 12, True), ("recompute", 30, True)],
)
def test_long_random_run_reads_only_its_own_tokens(
    policy, caching, mode, num_host_blocks, host_cache
):
    rng = random.Random(7)
    run = Run(
        17,
        caching,
        mode,
        num_host_blocks,
        host_cache,
        max_num_seqs=6,
        max_num_batched_tokens=16,
        long_prefill_token_threshold=6,
        policy=policy,
    )
    for _ in range(2000):
        if run.scheduler.num_waiting < 6:
            n = rng.choice([1, 1, 2, 3])
            run.add(
                rng.randint(1, 24),
                rng.randint(1, 16),
                n,
                rng.randint(0, 1),
                None,
                rng.random() < 0.2,
                beams=n > 1 and rng.random() < 0.5,
                awaits_tokens=rng.random() < 0.3,
            )
        if rng.random() < 0.05:
            run.scheduler.abort_request(rng.choice(run.requests).request_id)
        run.schedule()
        # The engine is one step behind; being further behind is harder.
        while len(run.unread) > rng.choice([0, 1, 1, 2, 3]):
            run.read()
        run.requests = [request for request in run.requests if not request.is_finished]
        run.check()
    stats = run.scheduler.stats()
    assert stats.num_preemptions > 20, "the run did not exercise what it should"
    assert (stats.blocks.prefix_hit_tokens > 100) is caching
    assert (stats.blocks.evictions > 100) is caching
    assert min(run.device.num_forks, run.device.num_copies) > 100
    assert run.num_searched > 50
    assert (stats.num_swaps > 20) is (mode == "swap")
    if num_host_blocks == 60:
        # All but the beams whose tokens were still to be chosen among.
        assert stats.num_swaps > 0.7 * stats.num_preemptions
    assert (stats.blocks.host_hits > 20) is (host_cache and caching)
    run.finish()


@pytest.mark.parametrize("num_blocks", [7, 9, 100])
@pytest.mark.parametrize("host", [(), ("swap", 40), ("swap", 3), ("swap", 9, True)])
def test_tokens_do_not_depend_on_pool_chunks_or_cache(num_blocks, host):
    """Each token is a function of those before: equal output shows that none was lost."""

    def generate(num_blocks: int, caching: bool, budget: int) -> list[list[int]]:
        run = Run(num_blocks, caching, *host, max_num_seqs=4, max_num_batched_tokens=budget)
        for length in (1, 5, 9, 12, 3):
            run.add(length, 10, 1, 0, None)
        assert len(run.requests) == 5
        run.finish()
        return [request.sequences[0].token_ids for request in run.requests]

    expected = generate(100, caching=False, budget=64)
    assert any(len(tokens) > 12 for tokens in expected)
    for caching in (True, False):
        for budget in (4, 7, 64):
            assert generate(num_blocks, caching, budget) == expected
