"""Whether a preempted group is better swapped out or computed again: costs as they were measured.

No clocks here: whoever runs the steps and the copies tells what they took. Both costs are running
averages, so they follow the machine's load, and the lengths of the day.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jpaged.config import PreemptionMode

# Share of the newest measurement in a running average.
_WEIGHT = 0.2


class PreemptionPolicy:
    """Chooses between swapping and recomputing.

    Attributes:
        mode: "recompute" or "swap" always, or "auto".
        seconds_per_block: of copying a block to the device, None until measured. Copying it to the
            host is taken to cost as much.
        seconds_per_token: of computing a token in a step with prompts, None until measured.
    """

    def __init__(self, mode: "PreemptionMode" = "recompute") -> None:
        self.mode: PreemptionMode = mode
        self.seconds_per_block: float | None = None
        self.seconds_per_token: float | None = None

    def note_copies(self, num_blocks: int, seconds: float) -> None:
        """Takes in what copying blocks to the device took."""
        self.seconds_per_block = _averaged(self.seconds_per_block, seconds / num_blocks)

    def note_prefill(self, num_tokens: int, seconds: float) -> None:
        """Takes in what a step of so many tokens, prompts among them, took."""
        self.seconds_per_token = _averaged(self.seconds_per_token, seconds / num_tokens)

    def prefers_swap(self, num_seqs: int, num_blocks: int, num_tokens: int) -> bool:
        """Whether a group is to be swapped out rather than computed again.

        Under "auto" a group of several sequences is swapped, as computing it again would undo their
        sharing for a while; so is the first of one sequence, to learn what that costs.

        Args:
            num_seqs: its unfinished sequences.
            num_blocks: blocks they hold, shared ones counted once.
            num_tokens: tokens that would have to be computed again.
        """
        if self.mode != "auto":
            return self.mode == "swap"
        if num_seqs > 1 or self.seconds_per_block is None or self.seconds_per_token is None:
            return True
        return 2 * num_blocks * self.seconds_per_block < num_tokens * self.seconds_per_token


def _averaged(average: float | None, value: float) -> float:
    return value if average is None else average + _WEIGHT * (value - average)
