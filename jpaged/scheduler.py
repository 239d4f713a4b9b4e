"""What runs in the next step: token budget, admission, preemption.

Schedules step n+1 before the tokens of step n are known: a sampled token counts as pending until
`append_token` brings it, and a decode whose input is pending takes it on the device, unless its
request awaits its tokens. Decides order and amounts only; blocks are the block manager's, stops and
text are the engine's.

Running requests are kept in order (arrival, or priority and then arrival) and served in that order,
so whoever is preempted for lack of blocks, always the last, has not been scheduled in the same
step. A sequence that cannot get a block even so stalls for the step, and nothing is admitted. Hence
every request ends: the first one can preempt all others, and `add_request` refuses what would not
fit alone.

The sequences of a request hold the full blocks of its prompt once. The first of them computes the
prompt, the others fork from it in the step of its last chunk. After a preemption each computes its
own output again, but starts from the prompt's blocks of whichever has them.
"""

import bisect
import heapq
from typing import TYPE_CHECKING

from jpaged.preemption import PreemptionPolicy
from jpaged.request import Request, Sequence, SequenceStatus
from jpaged.scheduler_output import SchedulerOutput, SchedulerStats
from jpaged.step_builder import StepBuilder

if TYPE_CHECKING:
    from jpaged.block_manager import BlockManager
    from jpaged.config import SchedulerConfig

_FINISHED = SequenceStatus.FINISHED


class Scheduler:
    """Chooses each step's sequences and tokens; single-threaded.

    Attributes:
        config: budgets and policy.
        block_manager: gives the blocks; not to be shared with another scheduler.
        preemption: says who is swapped out, and who computed again.
        num_preemptions: sequences preempted so far.
        num_swaps: those of them that were swapped out.
        num_steps: steps scheduled so far, empty ones not counted.
        num_prefill_tokens: tokens of prompts and of recomputed output scheduled so far.
    """

    def __init__(
        self,
        config: "SchedulerConfig",
        block_manager: "BlockManager",
        preemption: PreemptionPolicy | None = None,
    ) -> None:
        self.config = config
        self.block_manager = block_manager
        self.preemption = preemption or PreemptionPolicy()
        self.num_preemptions = 0
        self.num_swaps = 0
        self.num_steps = 0
        self.num_prefill_tokens = 0
        self._by_priority = config.policy == "priority"
        self._max_chunk = config.long_prefill_token_threshold or config.max_num_batched_tokens
        self._watermark = int(config.admission_watermark * block_manager.num_usable_blocks)
        self._requests: dict[str, Request] = {}
        self._num_arrived = 0
        # A heap; requests that finished while waiting stay in it until popped or outnumbering the
        # others.
        self._waiting: list[tuple[tuple[int, int], Request]] = []
        self._num_waiting = 0
        # In order of `_key`; finished requests are dropped at the next step.
        self._running: list[Request] = []
        self._has_finished_running = False
        self._num_running = 0
        self._free_rows = list(range(config.max_num_seqs - 1, -1, -1))
        self._num_in_prefill = 0
        self._step = StepBuilder(0)

    @property
    def num_waiting(self) -> int:
        """Requests waiting for admission, preempted ones included."""
        return self._num_waiting

    @property
    def num_running(self) -> int:
        """Requests admitted and not finished."""
        return self._num_running

    @property
    def num_running_seqs(self) -> int:
        """Sequences that hold a row."""
        return self.config.max_num_seqs - len(self._free_rows)

    def has_unfinished(self) -> bool:
        """Whether any request is waiting or running."""
        return bool(self._requests)

    def get_request(self, request_id: str) -> Request | None:
        """The unfinished request of that name."""
        return self._requests.get(request_id)

    def add_request(self, request: Request) -> None:
        """Puts a request in line.

        Raises:
            ValueError: if it can never run, or its id is that of an unfinished request.
        """
        max_length = self.check_request(request)
        request.arrival_index = self._num_arrived
        self._num_arrived += 1
        if request.is_beam_search:
            max_length = len(request.prompt_token_ids) + 1
        for seq in request.sequences:
            seq.max_length = max_length
        self._requests[request.request_id] = request
        self._num_waiting += 1
        heapq.heappush(self._waiting, (self._key(request), request))

    def abort_request(self, request_id: str) -> bool:
        """Ends a request at once, whatever is in flight; False if there is none of that name."""
        request = self._requests.get(request_id)
        if request is None:
            return False
        for seq in list(request.unfinished):
            self.finish_sequence(seq, "abort")
        return True

    def finish_sequence(
        self, seq: Sequence, reason: str, stop_reason: int | str | None = None
    ) -> bool:
        """Ends a sequence and frees its blocks and row at once; False if it had ended before.

        A step in flight may still include it: its token is to be discarded, and its blocks may be
        handed out again right away, since later steps run after that one (`prefix_cache` says why
        its last write is harmless).
        """
        if seq.status is _FINISHED:
            return False
        request = seq.request
        is_running = seq.status is SequenceStatus.RUNNING
        if is_running:
            self._release(seq)
        elif seq.status is SequenceStatus.SWAPPED:
            self.block_manager.free_swapped(seq)
        seq.status = _FINISHED
        seq.finish_reason = reason
        seq.stop_reason = stop_reason
        request.unfinished.remove(seq)
        if not request.unfinished:
            del self._requests[request.request_id]
            if is_running:
                self._num_running -= 1
                self._has_finished_running = True
            else:
                self._num_waiting -= 1
                if len(self._waiting) > 2 * self._num_waiting + 8:
                    self._waiting = [entry for entry in self._waiting if entry[1].unfinished]
                    heapq.heapify(self._waiting)
        return True

    def append_token(self, seq: Sequence, token_id: int) -> bool:
        """Brings the oldest pending token of a sequence; False, and no effect, if it has ended.

        Full blocks enter the prefix cache here, when their tokens are known. Stops are the caller's
        to find; at `seq.max_length` tokens a sequence is not scheduled any more and the caller must
        finish it.
        """
        if seq.status is _FINISHED:
            return False
        assert seq.num_pending > 0, f"a token arrives that no step sampled: {seq}"
        seq.num_pending -= 1
        token_ids = seq.token_ids
        token_ids.append(token_id)
        if seq.num_computed_tokens >= seq.register_at <= len(token_ids):
            self.block_manager.register_full_blocks(seq)
        return True

    def drop_token(self, seq: Sequence) -> None:
        """Gives up the pending token of a preempted sequence: it will be sampled again."""
        assert seq.status is SequenceStatus.PREEMPTED, f"not preempted: {seq}"
        assert seq.num_pending == 1, f"no pending token: {seq}"
        seq.num_pending = 0

    def advance_beams(
        self, request: Request, choices: list[tuple[Sequence, int]]
    ) -> list[Sequence]:
        """Continues a beam search with as many beams; the sequences that they are now, in order.

        The first to continue a sequence does so in place; the others fork from it in place of
        sequences that nothing continues. Blocks are copied when they are next written.

        Args:
            request: whose unfinished sequences each have one pending token, all of them read.
            choices: for each beam the sequence that it continues, and its token.
        """
        seqs = request.unfinished
        assert len(choices) == len(seqs), f"{len(choices)} choices for {request}"
        parents = {parent for parent, _ in choices}
        dropped = [seq for seq in seqs if seq not in parents]
        for seq in dropped:
            self.block_manager.free(seq)
        beams = []
        for parent, _ in choices:
            if parent in parents:
                parents.remove(parent)
                beams.append(parent)
            else:
                beam = dropped.pop()
                self._move_beam(beam, parent)
                beams.append(beam)
        for seq, (_, token_id) in zip(beams, choices, strict=True):
            seq.max_length = len(seq.token_ids) + 2
            self.append_token(seq, token_id)
        return beams

    def schedule(self) -> SchedulerOutput:
        """The next step; must be executed, after all steps scheduled before."""
        if self._has_finished_running:
            self._running = [request for request in self._running if request.unfinished]
            self._has_finished_running = False
        # Every running sequence past its prefill may decode; chunks get what is left.
        num_decoding = self.num_running_seqs - self._num_in_prefill
        step = self._step = StepBuilder(self.config.max_num_batched_tokens - num_decoding)
        seqs, starts, uses_pending = step.seqs, step.starts, step.uses_pending
        # Preempting shortens the list from its end while it is walked, which a list iterator
        # allows.
        for request in self._running:
            awaits_tokens = request.awaits_tokens
            for seq in request.unfinished:
                if seq.in_prefill:
                    if self._schedule_chunk(seq):
                        break  # The others forked from it, and their tokens are not sampled yet.
                    continue
                computed = seq.num_computed_tokens
                if computed + 1 >= seq.max_length:
                    continue  # Its last token is pending, or awaits the engine's verdict.
                pending = seq.num_pending
                if awaits_tokens and pending:
                    continue
                if computed >= seq.num_writable_slots and not self._allocate(seq, 1):
                    continue
                seqs.append(seq)
                starts.append(computed)
                uses_pending.append(pending > 0)
                seq.num_computed_tokens = computed + 1
                seq.num_pending = pending + 1
        if self._num_waiting and not step.preempted and not step.is_stalled:
            self._admit()
        manager = self.block_manager
        output = step.finish(manager.take_copies(), manager.take_swaps())
        if output.seqs:
            self.num_steps += 1
        return output

    def stats(self) -> SchedulerStats:
        """The counters, the block manager's included; O(live sequences)."""
        return SchedulerStats(
            num_waiting=self._num_waiting,
            num_running=self._num_running,
            num_running_seqs=self.num_running_seqs,
            num_steps=self.num_steps,
            num_preemptions=self.num_preemptions,
            num_swaps=self.num_swaps,
            num_swapped=self.block_manager.num_swapped_seqs,
            num_prefill_tokens=self.num_prefill_tokens,
            blocks=self.block_manager.stats(),
        )

    def check_invariants(self) -> None:
        """Recomputes everything from scratch, the block manager included.

        Raises:
            AssertionError: on a bug of ours, with both sides of the equation that does not hold.
        """
        self.block_manager.check_invariants()
        running = [request for request in self._running if request.unfinished]
        waiting = [request for _, request in self._waiting if request.unfinished]
        _check_equal("num_running", self._num_running, "running", len(running))
        _check_equal("num_waiting", self._num_waiting, "waiting", len(waiting))
        ids = sorted(request.request_id for request in running + waiting)
        _check_equal("requests", sorted(self._requests), "running and waiting", ids)
        keys = [self._key(request) for request in running]
        _check_equal("order of running", keys, "sorted", sorted(keys))
        seqs = [seq for request in running for seq in request.unfinished]
        rows = sorted([*self._free_rows, *(-1 if seq.row is None else seq.row for seq in seqs)])
        _check_equal("free and held rows", rows, "all rows", list(range(self.config.max_num_seqs)))
        in_prefill = sum(seq.in_prefill for seq in seqs)
        _check_equal("num_in_prefill", self._num_in_prefill, "counted", in_prefill)
        for seq in seqs:
            assert seq.status is SequenceStatus.RUNNING, f"running request, but {seq}"
            if seq.in_prefill:
                assert seq.num_pending == 0, f"pending token in prefill: {seq}"
                assert seq.num_computed_tokens < seq.length, f"prefill is over: {seq}"
            else:
                _check_equal("length", seq.length, "computed + 1", seq.num_computed_tokens + 1)
        for request in running:
            num_blocks = len(request.prompt_token_ids) // self.block_manager.block_size
            longest = max((seq.block_ids[:num_blocks] for seq in request.unfinished), key=len)
            for seq in request.unfinished:
                mine = seq.block_ids[:num_blocks]
                _check_equal(f"prompt's blocks of {seq}", mine, "siblings'", longest[: len(mine)])
        for seq in (seq for request in waiting for seq in request.unfinished):
            held = (seq.row, seq.block_ids, seq.in_prefill)
            _check_equal("held while waiting", held, "nothing", (None, [], False))
            if seq.status is SequenceStatus.SWAPPED:
                continue
            assert seq.status in (SequenceStatus.WAITING, SequenceStatus.PREEMPTED), (
                f"waiting, but {seq}"
            )
            held = (seq.host_block_ids, seq.num_computed_tokens)
            _check_equal("held unless swapped out", held, "nothing", ([], 0))
        owned = sum(len(seq.block_ids) for seq in seqs)
        _check_equal("references", self.block_manager.pool.num_references, "of running", owned)

    def check_request(self, request: Request) -> int:
        """Refuses what can never run; the length at which the request's sequences end.

        Raises:
            ValueError: The request's id is in use, its prompt or its number of sequences is out of
                range, or its sequences could not all fit in the pool.
        """
        config, manager = self.config, self.block_manager
        if request.request_id in self._requests:
            raise ValueError(
                f"request_id {request.request_id!r} is already in use by an unfinished request"
            )
        num_prompt_tokens = len(request.prompt_token_ids)
        if num_prompt_tokens < 1:
            raise ValueError("prompt must have at least 1 token, got 0")
        if num_prompt_tokens >= config.max_model_len:
            raise ValueError(
                f"prompt must have fewer than max_model_len={config.max_model_len} tokens, to "
                f"leave room for output, got {num_prompt_tokens}"
            )
        num_seqs = len(request.sequences)
        if not 1 <= num_seqs <= config.max_num_seqs:
            raise ValueError(
                f"n must be in [1, max_num_seqs={config.max_num_seqs}], got {num_seqs}"
            )
        max_tokens = request.sampling_params.max_tokens
        if max_tokens is not None and max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
        max_length = request.max_length(config.max_model_len)
        # The last token is never an input, so it needs no slot.
        num_shared = num_prompt_tokens // manager.block_size
        num_blocks = num_seqs * (manager.num_blocks_for(max_length - 1) - num_shared) + num_shared
        if num_blocks > manager.num_usable_blocks:
            shared = f" that share {num_shared}" if num_seqs > 1 else ""
            raise ValueError(
                f"request may need {num_blocks} blocks ({num_seqs} sequences of up to {max_length} "
                f"tokens{shared}), but the pool has {manager.num_usable_blocks} of "
                f"{manager.block_size} tokens; enlarge the pool or lower max_tokens, n or "
                "max_model_len"
            )
        return max_length

    def _key(self, request: Request) -> tuple[int, int]:
        return (request.priority if self._by_priority else 0, request.arrival_index)

    def _admit(self) -> None:
        step, waiting = self._step, self._waiting
        while waiting and step.chunk_budget > 0 and not step.is_stalled:
            request = waiting[0][1]
            if not request.unfinished:
                heapq.heappop(waiting)
                continue
            if len(request.unfinished) > len(self._free_rows) or not self._has_room(request):
                break
            if _is_swapped(request) and not self._swap_in(request):
                break
            heapq.heappop(waiting)
            self._num_waiting -= 1
            self._num_running += 1
            if not self._running or self._key(self._running[-1]) < self._key(request):
                self._running.append(request)
            else:
                bisect.insort(self._running, request, key=self._key)
            for seq in request.unfinished:
                seq.row = self._free_rows.pop()
                seq.status = SequenceStatus.RUNNING
                seq.in_prefill = True
            self._num_in_prefill += len(request.unfinished)
            step.admitted.extend(request.unfinished)
            for seq in request.unfinished:
                if self._schedule_chunk(seq, may_preempt=False):
                    break

    def _has_room(self, request: Request) -> bool:
        """Whether all known tokens of a waiting request fit beside what runs.

        More than its first chunk needs: a request admitted on its first chunk alone would be
        preempted before its prompt is through, and its work lost.
        """
        manager, size = self.block_manager, self.block_manager.block_size
        num_shared = len(request.prompt_token_ids) // size
        num_blocks = num_shared
        for seq in request.unfinished:
            if seq.num_pending:
                return False  # It was preempted in flight; what it sampled then has not arrived.
            num_blocks += -(-len(seq.token_ids) // size) - num_shared
        if not self._num_running:
            return True
        num_free = manager.num_free_blocks - self._watermark
        if _is_swapped(request):
            return manager.num_blocks_to_swap_in(request.unfinished) <= num_free
        if num_blocks > num_free:
            blocks = manager.pool.blocks
            cached = manager.prefix_cache.lookup(request.unfinished[0])
            num_blocks -= sum(blocks[block_id].ref_count > 0 for block_id in cached)
        return num_blocks <= num_free

    def _schedule_chunk(self, seq: Sequence, may_preempt: bool = True) -> bool:
        """Schedules what fits of a sequence's prefill; whether its siblings forked from it."""
        step = self._step
        if step.chunk_budget <= 0:
            return False
        cached: list[int] | None = []
        start = seq.num_computed_tokens
        if not seq.block_ids:
            cached = self._find_prefix(seq)
            if cached is None:
                return False
            start = len(cached) * self.block_manager.block_size
        num_known = len(seq.token_ids)
        num_tokens = min(num_known - start, step.chunk_budget, self._max_chunk)
        is_first = not seq.block_ids
        if not self._allocate(seq, num_tokens, cached, may_preempt):
            return False
        if is_first and seq.num_preemptions == 0:
            seq.num_cached_tokens = start
            self.block_manager.prefix_cache.count(num_known, start)
        seq.num_computed_tokens = start + num_tokens
        self.num_prefill_tokens += num_tokens
        is_last = start + num_tokens == num_known
        if is_last:
            seq.in_prefill = False
            seq.num_pending = 1
            self._num_in_prefill -= 1
        self.block_manager.register_full_blocks(seq)
        forks: list[Sequence] = []
        if is_last and num_known == seq.num_prompt_tokens:
            forks = self._fork_siblings(seq)
        step.add_chunk(seq, start, num_tokens, is_last, forks)
        return bool(forks)

    def _find_prefix(self, seq: Sequence) -> list[int] | None:
        """Blocks that a sequence without any starts from; None if it is to wait for a sibling."""
        manager, siblings = self.block_manager, seq.request.unfinished
        if len(siblings) == 1:
            return manager.get_cached_prefix(seq)
        is_first = seq is siblings[0]
        if not is_first and len(seq.token_ids) == seq.num_prompt_tokens:
            return None  # It forks.
        num_blocks = min(seq.num_prompt_tokens, len(seq.token_ids) - 1) // manager.block_size
        for sibling in siblings:
            if sibling.num_computed_tokens >= num_blocks * manager.block_size:
                return manager.get_shared_prefix(sibling, seq, num_blocks)
        return manager.get_cached_prefix(seq) if is_first else None

    def _fork_siblings(self, leader: Sequence) -> list[Sequence]:
        """Forks the rest of the group from the sequence that has just computed their prompt."""
        forks = [seq for seq in leader.request.unfinished if seq is not leader]
        for seq in forks:
            assert seq.in_prefill, f"{seq} is past the prompt that {leader} computes for it"
            self.block_manager.fork(leader, seq)
            seq.num_cached_tokens = leader.num_cached_tokens
            seq.in_prefill = False
            seq.num_pending = 1
            self._step.table_updates.append((seq, 0))
        self._num_in_prefill -= len(forks)
        return forks

    def _allocate(
        self,
        seq: Sequence,
        num_tokens: int,
        cached: "list[int] | tuple[()]" = (),
        may_preempt: bool = True,
    ) -> bool:
        manager, step = self.block_manager, self._step
        first_changed = 0 if cached else seq.num_computed_tokens // manager.block_size
        while (new_ids := manager.allocate_slots(seq, num_tokens, cached)) is None:
            # Preempting frees blocks without evicting any, so `cached` stays valid.
            if not may_preempt or self._running[-1] is seq.request:
                step.is_stalled = True
                return False
            self._preempt_last()
        if seq.has_new_table:
            seq.has_new_table = False
            step.table_updates.append((seq, 0))
        elif new_ids or cached:
            step.table_updates.append((seq, first_changed))
        return True

    def _move_beam(self, seq: Sequence, parent: Sequence) -> None:
        """Makes a sequence without blocks equal to another one of its group."""
        seq.token_ids = parent.token_ids.copy()
        seq.block_hashes = parent.block_hashes.copy()
        if parent.block_ids:
            self.block_manager.fork(parent, seq)
            seq.has_new_table = True

    def _swap_in(self, request: Request) -> bool:
        """Brings a group's blocks back, if there is room."""
        if not self.block_manager.swap_in(request.unfinished):
            return False
        updates = self._step.table_updates
        updates.extend((seq, 0) for seq in request.unfinished if seq.block_ids)
        return True

    def _swap_out(self, request: Request) -> bool:
        """Moves a group's blocks to the host, if that is what is to be done and there is room."""
        seqs = request.unfinished
        num_tokens = sum(seq.num_computed_tokens for seq in seqs)
        if self.block_manager.host is None or not num_tokens:
            return False
        if request.is_beam_search and any(seq.num_pending for seq in seqs):
            # The choice among their tokens is still to come, and forks blocks of the device.
            return False
        num_blocks = len({block_id for seq in seqs for block_id in seq.block_ids})
        if not self.preemption.prefers_swap(len(seqs), num_blocks, num_tokens):
            return False
        return self.block_manager.swap_out(seqs)

    def _preempt_last(self) -> None:
        request = self._running.pop()
        status = SequenceStatus.PREEMPTED
        if self._swap_out(request):
            status = SequenceStatus.SWAPPED
            self.num_swaps += len(request.unfinished)
        for seq in request.unfinished:
            self._release(seq)
            seq.status = status
            seq.num_preemptions += 1
        self.num_preemptions += len(request.unfinished)
        self._step.preempted.extend(request.unfinished)
        self._num_running -= 1
        self._num_waiting += 1
        # Its key puts it before everything that arrived later, which all that waits under "fcfs"
        # did.
        heapq.heappush(self._waiting, (self._key(request), request))

    def _release(self, seq: Sequence) -> None:
        self.block_manager.free(seq)
        assert seq.row is not None, f"running without a row: {seq}"
        self._free_rows.append(seq.row)
        seq.row = None
        if seq.in_prefill:
            seq.in_prefill = False
            self._num_in_prefill -= 1


def _is_swapped(request: Request) -> bool:
    return request.unfinished[0].status is SequenceStatus.SWAPPED


def _check_equal(left_name: str, left: object, right_name: str, right: object) -> None:
    assert left == right, f"{left_name} != {right_name}: {left} != {right}"
