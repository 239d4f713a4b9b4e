"""Requests (sequence groups) and their sequences: tokens, counters, status.

Plain state, changed by the scheduler and the block manager only; the engine reads it. The one
arithmetic to know:

    length = len(token_ids) + num_pending        tokens that exist, on the host or still on the
    device num_computed_tokens <= length                tokens whose K and V are computed, or will
    be by a dispatched step

A running sequence is either in prefill (`in_prefill`, nothing pending) or decodes, and then exactly
one token, the newest, is not yet computed: `length == num_computed_tokens + 1`.
"""

import enum
from typing import Protocol


class GroupParams(Protocol):
    """What the scheduler reads of a request's sampling parameters."""

    @property
    def n(self) -> int:
        """Sequences of the group, unless the request says another number."""
        ...

    @property
    def max_tokens(self) -> int | None:
        """Most tokens to generate in each sequence; None for as many as the model allows."""
        ...


class SequenceStatus(enum.StrEnum):
    """Where a sequence stands; prefill and decode describe a step, they are not states."""

    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    SWAPPED = "swapped"
    FINISHED = "finished"


class Sequence:
    """One continuation of a request's prompt.

    Attributes:
        request: the group it belongs to.
        seq_index: 0..n-1 in its group.
        token_ids: prompt and the output known to the host.
        num_prompt_tokens: how many of them are the prompt.
        max_length: tokens, prompt and output, at which it ends; set by `Scheduler.add_request`.
            Of a beam one more than its known tokens: what follows them is the group's choice, made
            when the tokens of all beams are there.
        num_pending: tokens sampled by a dispatched step and not yet read by the host.
        num_computed_tokens: tokens whose K and V are in the pool, or were when it was swapped out,
            once the dispatched steps have run.
        num_writable_slots: slots from the first that may be written without asking the block
            manager: they are allocated and not shared. After a fork they end where the shared
            block's free slots begin.
        in_prefill: running, and its last known token not yet scheduled.
        block_ids: its blocks in order.
        host_block_ids: its blocks on the host in order, while it is swapped out.
        block_hashes: chained hashes of its full blocks, as far as they were needed; survives
            preemption.
        has_new_table: whether its blocks were exchanged since its last step, so that its whole
            table goes with the next.
        num_registered_blocks: leading blocks that went through the prefix cache.
        register_at: number of known and computed tokens at which the next block can be registered.
        row: its row in the runner's persistent arrays while it runs.
        status: where it stands.
        finish_reason: "stop", "length", "abort" or another word of the engine's, once finished.
        stop_reason: the stop token id or string that ended it, if one did.
        num_preemptions: how often it was preempted.
        num_cached_tokens: prompt tokens found in the prefix cache when it first ran.
        engine_state: what the engine keeps for it (detokeniser, log-probabilities); not looked at
            here.
    """

    __slots__ = (
        "block_hashes",
        "block_ids",
        "engine_state",
        "finish_reason",
        "has_new_table",
        "host_block_ids",
        "in_prefill",
        "max_length",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_pending",
        "num_preemptions",
        "num_prompt_tokens",
        "num_registered_blocks",
        "num_writable_slots",
        "register_at",
        "request",
        "row",
        "seq_index",
        "status",
        "stop_reason",
        "token_ids",
    )

    def __init__(self, request: "Request", seq_index: int) -> None:
        self.request = request
        self.seq_index = seq_index
        self.token_ids: list[int] = list(request.prompt_token_ids)
        self.num_prompt_tokens = len(self.token_ids)
        self.max_length = 0
        self.num_pending = 0
        self.num_computed_tokens = 0
        self.num_writable_slots = 0
        self.in_prefill = False
        self.block_ids: list[int] = []
        self.host_block_ids: list[int] = []
        self.block_hashes: list[bytes] = []
        self.has_new_table = False
        self.num_registered_blocks = 0
        self.register_at = 0
        self.row: int | None = None
        self.status = SequenceStatus.WAITING
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self.num_preemptions = 0
        self.num_cached_tokens = 0
        self.engine_state: object = None

    def __repr__(self) -> str:
        return (
            f"Sequence({self.request.request_id!r}/{self.seq_index}, {self.status.value}, "
            f"known={len(self.token_ids)}, pending={self.num_pending}, "
            f"computed={self.num_computed_tokens}, blocks={self.block_ids}, row={self.row})"
        )

    @property
    def length(self) -> int:
        """Tokens that exist, known or pending."""
        return len(self.token_ids) + self.num_pending

    @property
    def num_output_tokens(self) -> int:
        """Generated tokens known to the host."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def output_token_ids(self) -> list[int]:
        """Generated tokens known to the host, as a new list."""
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def is_finished(self) -> bool:
        """Whether it has ended, for whatever reason."""
        return self.status is SequenceStatus.FINISHED


class Request:
    """A sequence group: one prompt and its continuations, preempted and resumed together.

    Attributes:
        request_id: the caller's name for it, unique among unfinished requests.
        prompt_token_ids: the prompt.
        prompt: its text, if it came as text.
        sampling_params: what was asked of it.
        sequences: all its sequences, by `seq_index`.
        unfinished: those of them that have not ended, in order.
        arrival_time: in seconds, on whatever clock the engine uses.
        arrival_index: its place in the order of arrival, set by `Scheduler.add_request`.
        priority: lower runs first under the policy "priority".
        cache_salt: requests share cached blocks only with requests of equal salt.
        eos_token_ids: the model's end-of-sequence tokens.
        skip_prefix_cache: whether all of its prompt is to be computed, as prompt log-probabilities
            need; its blocks are shared with others all the same.
        is_beam_search: whether its sequences are beams, which go on only by
            `Scheduler.advance_beams`.
        awaits_tokens: whether a sequence's next step needs the token of its last one on the host,
            as the mask of structured output does.
        engine_state: what the engine keeps for it; not looked at here.
    """

    __slots__ = (
        "arrival_index",
        "arrival_time",
        "awaits_tokens",
        "cache_salt",
        "engine_state",
        "eos_token_ids",
        "is_beam_search",
        "priority",
        "prompt",
        "prompt_token_ids",
        "request_id",
        "sampling_params",
        "sequences",
        "skip_prefix_cache",
        "unfinished",
    )

    def __init__(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        sampling_params: GroupParams,
        *,
        prompt: str | None = None,
        arrival_time: float = 0.0,
        priority: int = 0,
        cache_salt: str | None = None,
        eos_token_ids: tuple[int, ...] = (),
        skip_prefix_cache: bool = False,
        num_seqs: int | None = None,
        is_beam_search: bool = False,
        awaits_tokens: bool = False,
    ) -> None:
        self.request_id = request_id
        self.prompt_token_ids = prompt_token_ids
        self.prompt = prompt
        self.sampling_params = sampling_params
        self.arrival_time = arrival_time
        self.arrival_index = -1
        self.priority = priority
        self.cache_salt = cache_salt
        self.eos_token_ids = eos_token_ids
        self.skip_prefix_cache = skip_prefix_cache
        self.is_beam_search = is_beam_search
        self.awaits_tokens = awaits_tokens
        self.engine_state: object = None
        count = sampling_params.n if num_seqs is None else num_seqs
        self.sequences = [Sequence(self, index) for index in range(count)]
        self.unfinished = list(self.sequences)

    def __repr__(self) -> str:
        return (
            f"Request({self.request_id!r}, n={len(self.sequences)}, "
            f"unfinished={len(self.unfinished)})"
        )

    def max_length(self, max_model_len: int) -> int:
        """Tokens, prompt and output, at which its sequences end."""
        max_tokens = self.sampling_params.max_tokens
        if max_tokens is None:
            return max_model_len
        return min(max_model_len, len(self.prompt_token_ids) + max_tokens)

    @property
    def is_finished(self) -> bool:
        """Whether all its sequences have ended."""
        return not self.unfinished
