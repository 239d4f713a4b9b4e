"""From a scheduled step to its token ids: buffers, the jitted step, results read later.

Makes no scheduling decisions, and touches no device but through its `DeviceWorker`. `dispatch`
returns before the step has run; its result is read through the handle it gives.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from jpaged.device_worker import DeviceWorker
from jpaged.input_batch import InputBatch, packed_size
from jpaged.request import Sequence
from jpaged.sampling_rows import RequestSampling
from jpaged.scheduler_output import SchedulerOutput


@dataclasses.dataclass(frozen=True, slots=True)
class PositionLogprobs:
    """Log-probabilities of one position, in NumPy."""

    logprob: float
    rank: int
    top_token_ids: NDArray[np.int32]
    top_logprobs: NDArray[np.float32]


@dataclasses.dataclass(frozen=True, slots=True)
class StepResult:
    """What a step sampled, one entry a scheduled sequence; log-probabilities as arrays."""

    tokens: list[int]
    sampled: "_Logprobs"
    prompt: "_Logprobs | None"

    def logprobs(self, index: int) -> PositionLogprobs:
        """Of the token sampled for sequence `index` of the step."""
        return self.sampled.at(index)

    def prompt_logprobs(self, index: int) -> PositionLogprobs:
        """Of the prompt token that follows flat token `index` of the step."""
        assert self.prompt is not None, "the step computed no prompt log-probabilities"
        return self.prompt.at(index)


class _Logprobs:
    """Log-probabilities still on the device, read once when first asked for."""

    def __init__(self, arrays: Any) -> None:
        self._arrays = arrays
        self._host: Any = None

    def at(self, index: int) -> PositionLogprobs:
        if self._host is None:
            self._host = jax.device_get(self._arrays)
        host = self._host
        return PositionLogprobs(
            float(host.logprobs[index]),
            int(host.ranks[index]),
            host.top_token_ids[index],
            host.top_logprobs[index],
        )


class StepHandle:
    """A step that was dispatched; `result` waits for it.

    Attributes:
        scheduled: What runs.
        dispatched_s: When it was dispatched, on the clock `time.perf_counter`.
    """

    def __init__(
        self,
        scheduled: SchedulerOutput,
        outputs: dict[str, Any],
        dispatched_s: float,
        wait: Callable[[dict[str, Any]], None],
    ) -> None:
        self.scheduled = scheduled
        self.dispatched_s = dispatched_s
        self._outputs = outputs
        self._wait = wait
        outputs["tokens"].copy_to_host_async()

    def result(self) -> StepResult:
        """The step's tokens, once it has run."""
        self._wait(self._outputs)
        tokens = np.asarray(self._outputs["tokens"]).tolist()
        prompt = self._outputs.get("prompt")
        return StepResult(
            tokens,
            _Logprobs(self._outputs.get("sampled")),
            None if prompt is None else _Logprobs(prompt),
        )


class ModelRunner:
    """The host side of an engine's steps.

    Args:
        worker: The device side.
        block_size: Tokens of a block.
        num_rows: Sequences that may run at once.
    """

    def __init__(self, worker: DeviceWorker, block_size: int, num_rows: int) -> None:
        self.worker = worker
        self.plan = worker.plan
        self.num_blocks = worker.num_blocks
        self.num_host_blocks = worker.num_host_blocks
        self._banning: list[RequestSampling | None] = [None] * num_rows
        self._wants_prompt = [False] * num_rows
        self._is_plain = [False] * num_rows
        width = worker.max_blocks_per_seq
        self._batch = InputBatch(
            num_rows,
            width,
            block_size,
            self.num_blocks,
            max(packed_size(shape, width) for shape in worker.shapes),
        )

    # Rows.

    def admit(self, seq: Sequence, sampling: RequestSampling, prompt_logprobs: bool) -> None:
        """Gives a sequence's row its sampling parameters and, where needed, its state.

        Args:
            seq: A sequence that was given a row in the step about to be dispatched.
            sampling: Its request's parameters.
            prompt_logprobs: Whether log-probabilities of its prompt are wanted.
        """
        row = seq.row
        assert row is not None, f"{seq} was admitted without a row"
        self._batch.set_row(row, sampling.row(seq.seq_index))
        self._banning[row] = sampling if sampling.may_ban else None
        self._wants_prompt[row] = prompt_logprobs
        self._is_plain[row] = sampling.is_plain and not prompt_logprobs
        if not sampling.needs_state:
            return
        self.worker.init_row(
            row,
            seq.num_prompt_tokens,
            sampling.only_listed,
            np.array(seq.token_ids, np.int32),
            np.array(sampling.bias_token_ids, np.int32),
            np.array(sampling.bias_values, np.float32),
        )

    def set_masks(self, rows: list[int], fill: Callable[[NDArray[np.int32]], None]) -> None:
        """Sets the tokens that structured output allows next in some rows.

        Args:
            rows: Rows of running sequences.
            fill: Writes their masks, in that order, into an `int32[N, W]`.
        """
        self.worker.set_masks(*self.worker.masks.fill(rows, fill))

    # Steps.

    def swap(self, scheduled: SchedulerOutput) -> None:
        """Starts a step's copies to the host and from there; goes before its `dispatch`."""
        self.worker.swap(scheduled.swap_outs, scheduled.swap_ins)

    def dispatch(self, scheduled: SchedulerOutput) -> StepHandle:
        """Starts a step and returns at once."""
        num_seqs = len(scheduled.seqs)
        decode_only = scheduled.num_decodes == num_seqs and not self._needs_prompt(scheduled)
        plain = not scheduled.block_copies and all(map(self._asks_nothing_else, scheduled.seqs))
        program = self.plan.choose(scheduled.num_batched_tokens, num_seqs, decode_only, plain)
        self.worker.prepare(program)
        packed = self._batch.fill(
            scheduled, program.shape, self._bans_of, self._wants_prompt_logprobs
        )
        start = time.perf_counter()
        outputs = self.worker.run(program, packed)
        return StepHandle(scheduled, outputs, start, self.worker.wait)

    def _bans_of(self, seq: Sequence) -> Any:
        assert seq.row is not None, f"{seq} is scheduled without a row"
        sampling = self._banning[seq.row]
        if sampling is None:
            return ()
        # The scheduler has counted the token that this step samples as pending already.
        return sampling.bans(seq.output_token_ids, seq.num_pending - 1)

    def _wants_prompt_logprobs(self, seq: Sequence) -> bool:
        assert seq.row is not None, f"{seq} is scheduled without a row"
        return self._wants_prompt[seq.row]

    def _asks_nothing_else(self, seq: Sequence) -> bool:
        assert seq.row is not None, f"{seq} is scheduled without a row"
        return self._is_plain[seq.row]

    def _needs_prompt(self, scheduled: SchedulerOutput) -> bool:
        """Whether log-probabilities of a prompt are wanted, which decode programs leave out."""
        return any(self._wants_prompt) and any(
            start + 1 < seq.num_prompt_tokens and self._wants_prompt_logprobs(seq)
            for seq, start in zip(scheduled.seqs, scheduled.starts, strict=True)
        )

    def reset(self) -> None:
        """Makes the device's state valid again after a step that failed or was interrupted."""
        self.worker.reset()

    def shutdown(self) -> None:
        """Ends background compilation and lets go of the device's memory."""
        self.worker.shutdown()
