"""The leader's own devices: each call goes to the other hosts before it is made here."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jpaged.compile_plan import ProgramState, StepProgram
from jpaged.config import SchedulerConfig
from jpaged.device_worker import DeviceWorker, Pairs
from jpaged.engine_config import EngineConfig
from jpaged.models.loader import LoadedModel
from jpaged.multihost.agreement import start_jax
from jpaged.multihost.leader import Leader
from jpaged.multihost.location import locate


def lead(config: EngineConfig) -> Leader:
    """The other hosts of an engine, once they are here and JAX knows of them.

    Raises:
        ValueError: This host is not the leader; otherwise see `Leader`.
    """
    location = locate(config)
    if location.rank:
        raise ValueError(
            "an engine needs node_rank=0; the other hosts run jpaged.multihost.follow, as the "
            f"command line does by itself, got {location.rank}"
        )
    leader = Leader(config, location)
    start_jax(location, config.nnodes)
    return leader


class LeadingWorker(DeviceWorker):
    """A worker whose calls the other hosts repeat.

    Args:
        loaded: As for any worker, and so are the others.
        config: What the user set.
        scheduler_config: The budgets.
        leader: The other hosts.
        on_copy_in: See `BlockSwapper`.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        config: EngineConfig,
        scheduler_config: SchedulerConfig,
        leader: Leader,
        on_copy_in: Callable[[int, float], None] | None = None,
    ) -> None:
        self._leader = leader
        super().__init__(
            loaded, config, scheduler_config, exchange=leader.exchange, on_copy_in=on_copy_in
        )

    def prepare(self, program: StepProgram) -> None:
        """Has all hosts compile a program at once where this one has not yet."""
        if program.state is not ProgramState.READY:
            self._leader.tell("prepare", program.name)
        super().prepare(program)

    def run(self, program: StepProgram, packed: NDArray[np.int32]) -> dict[str, Any]:
        """See `DeviceWorker`."""
        with self._leader.together("run", program.name, packed):
            return super().run(program, packed)

    def init_row(
        self,
        row: int,
        num_prompt_tokens: int,
        only_listed: bool,
        token_ids: NDArray[np.int32],
        bias_token_ids: NDArray[np.int32],
        bias_values: NDArray[np.float32],
    ) -> None:
        """See `DeviceWorker`."""
        args = (row, num_prompt_tokens, only_listed, token_ids, bias_token_ids, bias_values)
        with self._leader.together("init_row", *args):
            super().init_row(*args)

    def set_masks(self, rows: NDArray[np.int32], masks: NDArray[np.int32]) -> None:
        """See `DeviceWorker`."""
        with self._leader.together("set_masks", rows, masks):
            super().set_masks(rows, masks)

    def swap(self, swap_outs: Pairs, swap_ins: Pairs) -> None:
        """See `DeviceWorker`."""
        with self._leader.together("swap", swap_outs, swap_ins):
            super().swap(swap_outs, swap_ins)

    def reset(self) -> None:
        """See `DeviceWorker`."""
        with self._leader.together("reset"):
            super().reset()

    def wait(self, outputs: dict[str, Any]) -> None:
        """Returns when a step's outputs can be read; raises if a host is gone."""
        self._leader.wait(outputs["tokens"])

    def shutdown(self) -> None:
        """Ends this host's part, and the others."""
        super().shutdown()
        self._leader.close()
