"""How long a step takes: a stated model of the paper's device, in place of the device.

A step multiplies all its tokens with all weights, reads the K and V of its sequences' contexts, and
is handled on the host, sequence by sequence:

    t = fixed + per_sequence * sequences
        + max(weight bytes / B, 2 * parameters * tokens / F)
        + K and V bytes read * kernel / B + attention FLOPs of prompts / F
        + 2 * bytes copied on the device / B

Every constant and where it comes from:

    B   1555 GB/s (data sheet of the A100 40 GB) times 0.90: what BabelStream's triad reaches on it.
    F   312 TFLOP/s (data sheet, dense fp16) times 0.52: what Megatron-LM reports for whole
        transformers on A100s (Narayanan et al., SC 2021: 163 TFLOP/s a GPU).
    kernel   for paged attention 1.23 at a block size of 16, the middle of the paper's own Figure
        18a (20 to 26 % above FasterTransformer's kernel); 1 for the baselines.
    fixed, per_sequence   not on any data sheet: what the software of the paper's systems took on
        the host and beside the kernels. `calibrate` derives both from what the paper printed about
        its three Orca baselines; nothing that the paper measured of vLLM goes in.
"""

import dataclasses
import math
from typing import Final

from benchmarks.paper import published


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """One GPU and its link to the host; the defaults are the paper's, see the module.

    Attributes:
        memory_bytes_s: reading GPU memory.
        flop_s: fp16 matrix products.
        link_bytes_s: copies between GPU and pinned host memory, one direction: PCIe 4.0 x16 carries
            31.5 GB/s, of which bulk copies reach about 25.
        transfer_s: what one such copy costs beside its bytes: an assumption, of the order of what
            back-to-back asynchronous copies take.
    """

    memory_bytes_s: float = 0.90 * 1555e9
    flop_s: float = 0.52 * 312e12
    link_bytes_s: float = 25e9
    transfer_s: float = 5e-6


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """A model on its GPUs, with the memory the paper gives it (its Table 1).

    Attributes:
        parameters: of all layers and the output projection.
        num_layers: layers.
        hidden_size: the width of K and of V of a token, since all are multi-head.
        num_gpus: over which all of it is split evenly.
        num_slots: tokens whose K and V fit.
    """

    parameters: float
    num_layers: int
    hidden_size: int
    num_gpus: int
    num_slots: int

    @property
    def token_bytes(self) -> int:
        """K and V of one token in fp16."""
        return 2 * 2 * self.num_layers * self.hidden_size


MODELS: Final = {
    # Hidden sizes and layers: Zhang et al., OPT, 2022, Table 1. LLaMA-13B has the same of both.
    "opt-13b": Model(
        parameters=13e9, num_layers=40, hidden_size=5120, num_gpus=1, num_slots=15_700
    ),
    "opt-66b": Model(parameters=66e9, num_layers=64, hidden_size=9216, num_gpus=4, num_slots=9_700),
    "opt-175b": Model(
        parameters=173e9, num_layers=96, hidden_size=12288, num_gpus=8, num_slots=60_100
    ),
}


@dataclasses.dataclass(frozen=True, slots=True)
class Link:
    """Copies of blocks between one GPU and its host.

    Attributes:
        model: whose K and V are copied.
        is_fused: whether all blocks go in one transfer; else each layer's K and V of each block go
            in one of their own, as in the paper's system.
        device: the GPU.
    """

    model: Model
    is_fused: bool = False
    device: Device = Device()

    def copy_s(self, num_blocks: int, block_size: int) -> float:
        """Seconds to copy so many blocks in one direction."""
        transfers = 1 if self.is_fused else 2 * self.model.num_layers * num_blocks
        num_bytes = num_blocks * block_size * self.model.token_bytes
        return transfers * self.device.transfer_s + num_bytes / self.device.link_bytes_s


@dataclasses.dataclass(slots=True)
class StepWork:
    """What one step does.

    Attributes:
        num_seqs: sequences that get a token.
        num_tokens: tokens that go through the layers.
        context_tokens: tokens whose K and V attention reads, once for every sequence that reads
            them.
        prompt_pairs: pairs of a prompt token and a token it attends to.
        copied_tokens: tokens whose K and V are copied within the device.
        host_s: seconds the step waits for copies to or from the host.
    """

    num_seqs: int = 0
    num_tokens: int = 0
    context_tokens: int = 0
    prompt_pairs: int = 0
    copied_tokens: int = 0
    host_s: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StepTime:
    """Seconds of a step on a model's GPUs.

    Attributes:
        model: the model.
        fixed_s: host time of every step.
        per_seq_s: host time of every sequence of a step.
        kernel: time of the attention kernel over that of reading K and V once.
        device: each of the GPUs.
    """

    model: Model
    fixed_s: float
    per_seq_s: float
    kernel: float = 1.0
    device: Device = Device()

    def __call__(self, work: StepWork) -> float:
        """The model's equation."""
        model, memory = self.model, self.device.memory_bytes_s * self.model.num_gpus
        flops = self.device.flop_s * model.num_gpus
        copied_or_read = work.context_tokens * self.kernel + 2 * work.copied_tokens
        attention = 4.0 * model.num_layers * model.hidden_size * work.prompt_pairs
        products = max(
            2 * model.parameters / memory, 2 * model.parameters * work.num_tokens / flops
        )
        return (
            self.fixed_s
            + self.per_seq_s * work.num_seqs
            + products
            + copied_or_read * model.token_bytes / memory
            + attention / flops
            + work.host_s
        )


def paper_kernel(block_size: int) -> float:
    """Time of the paper's attention kernel over that of reading K and V once, by block size.

    A model: whatever paging costs the kernel is a cost of each block, so it falls as 1 / block
    size from what the paper measured at 16.
    """
    return 1.0 + sum(published.FIGURE_18A_SLOWDOWN) / 2 * 16 / block_size


@dataclasses.dataclass(frozen=True, slots=True)
class CalibrationPoint:
    """One baseline on one trace: the step time that the paper's numbers imply, in seconds.

    Attributes:
        name: system and trace.
        num_seqs: mean batch (Figure 13).
        implied_s: num_seqs / (knee of Figure 12 * mean output length), by Little's law.
        device_s: what the device's share of the model says.
    """

    name: str
    num_seqs: float
    implied_s: float
    device_s: float


def calibration_points() -> list[CalibrationPoint]:
    """Orca's three baselines on both traces, OPT-13B."""
    model, points = MODELS["opt-13b"], []
    bare = StepTime(model=model, fixed_s=0.0, per_seq_s=0.0)
    for trace, (prompt, output) in published.MEAN_LENGTHS.items():
        knees = published.FIGURE_12["opt-13b", trace]
        for index in (1, 2, 3):
            system = published.SYSTEMS[index]
            num_seqs = published.FIGURE_13[trace][1][index - 1]
            if trace == "sharegpt":
                context = published.FIGURE_2[system]["tokens"] / 100 * model.num_slots
            else:
                context = num_seqs * (prompt + output / 2)
            work = StepWork(num_tokens=math.ceil(num_seqs), context_tokens=round(context))
            implied = num_seqs / (knees[index] * output)
            points.append(CalibrationPoint(f"{system}, {trace}", num_seqs, implied, bare(work)))
    return points


def calibrate() -> tuple[float, float]:
    """Fixed and per-sequence host seconds: the least-squares line through the points' rest."""
    points = calibration_points()
    xs = [point.num_seqs for point in points]
    ys = [point.implied_s - point.device_s for point in points]
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / sum(
        (x - mean_x) ** 2 for x in xs
    )
    return mean_y - slope * mean_x, slope
