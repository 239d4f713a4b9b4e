"""Requests: real lengths, Poisson arrivals as in the paper."""

import dataclasses
import functools
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from benchmarks import common
from benchmarks.paper import published

MAX_MODEL_LEN: Final = 2048
"""The most tokens OPT takes; as in the paper's runs, longer requests are left out."""

CHATBOT_LENGTH: Final = 1024
"""Figure 17: the prompt is the last 1024 tokens of the conversation, the output at most as many."""

START_TOKENS: Final = 1
"""OPT's tokenizer begins every text with a token of its own, and the paper's scripts count it in
prompts and outputs (tokenize_sharegpt.py in the history of vLLM); the counts of our data do not."""

TRANSLATION: Final = {"source": 27.0, "target": 53.0, "log_sd": 0.55, "log_correlation": 0.84}
"""Figure 16: tokens of an English news sentence and of its German translation.

Moments of 2,737 sentences of newstest2014 (source) and of 9,999 training pairs of WMT's English to
German task (ratio of 1.97, spread, correlation), counted with the default model's tokenizer, which,
made for English, cuts German finer than LLaMA's does. WMT16's own test set was not at hand.
"""


@dataclasses.dataclass(frozen=True, slots=True)
class Job:
    """One request.

    Attributes:
        index: its place in the order of arrival.
        arrival_s: when it arrives.
        prompt_tokens: tokens of the prompt, a shared prefix included.
        output_tokens: tokens that each of its sequences generates; no system but Orca (Oracle)
            knows the number beforehand.
        num_seqs: parallel samples, or beams.
        is_beam: whether its sequences are beams.
        prefix_tokens: how many of the prompt's first tokens all requests have in common.
    """

    index: int
    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    num_seqs: int = 1
    is_beam: bool = False
    prefix_tokens: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Trace:
    """Lengths to draw requests from.

    Attributes:
        name: of the data set.
        lengths: (prompt, output) tokens.
        num_seqs: sequences of each request.
        is_beam: whether they are beams.
        prefix_tokens: tokens put before every prompt, equal in all.
    """

    name: str
    lengths: tuple[tuple[int, int], ...]
    num_seqs: int = 1
    is_beam: bool = False
    prefix_tokens: int = 0

    def jobs(self, rate: float, duration_s: float, seed: int = 0) -> list[Job]:
        """Poisson arrivals at `rate` a second for so long.

        The k-th request has the same lengths at every rate, and the gaps only scale, so that two
        rates differ in nothing but the rate. Every length is used once before any is used again.
        """
        gaps, order = random.Random(seed), random.Random(seed + 1)
        jobs: list[Job] = []
        deck: list[tuple[int, int]] = []
        now = gaps.expovariate(1.0) / rate
        while now < duration_s:
            if not deck:
                deck = list(self.lengths)
                order.shuffle(deck)
            prompt, output = deck.pop()
            jobs.append(
                Job(
                    index=len(jobs),
                    arrival_s=now,
                    prompt_tokens=self.prefix_tokens + prompt,
                    output_tokens=output,
                    num_seqs=self.num_seqs,
                    is_beam=self.is_beam,
                    prefix_tokens=self.prefix_tokens,
                )
            )
            now += gaps.expovariate(1.0) / rate
        return jobs

    @property
    def mean_lengths(self) -> tuple[float, float]:
        """Mean prompt, the prefix included, and mean output."""
        n = len(self.lengths)
        prompts, outputs = (sum(column) / n for column in zip(*self.lengths, strict=True))
        return self.prefix_tokens + prompts, outputs


def make_trace(name: str, lengths: Sequence[tuple[int, int]]) -> Trace:
    """A trace of those lengths that a sequence of `MAX_MODEL_LEN` tokens has room for."""
    return Trace(name, tuple((p, o) for p, o in lengths if p + o < MAX_MODEL_LEN))


@functools.cache
def load_trace(name: str, workloads: Path) -> Trace:
    """One of the data sets: "sharegpt", "alpaca" or "chatbot"."""
    loader = common.load_workloads(workloads)
    source = {"sharegpt": "sharegpt_single", "alpaca": "alpaca", "chatbot": "sharegpt_turns"}[name]
    lengths = [(r.prompt_tokens, r.output_tokens) for r in loader.load(source)]
    lengths = [(p + START_TOKENS, o + START_TOKENS) for p, o in lengths]
    if name == "chatbot":
        # One slot less than the paper's 1024 + 1024: the engine ends a sequence at 2048 tokens.
        most = CHATBOT_LENGTH - 1
        lengths = [(min(p, CHATBOT_LENGTH), min(o, most)) for p, o in lengths]
    return make_trace(name, lengths)


def scale_to_paper(trace: Trace) -> Trace:
    """The same requests stretched so that their mean lengths are those of the paper's Figure 11."""
    factors = [
        theirs / ours
        for theirs, ours in zip(published.MEAN_LENGTHS[trace.name], trace.mean_lengths, strict=True)
    ]
    scaled = [
        tuple(max(1, round(n * f)) for n, f in zip(pair, factors, strict=True))
        for pair in trace.lengths
    ]
    return make_trace(trace.name, [(prompt, output) for prompt, output in scaled])


def translation_trace(prefix_tokens: int, num: int = 3000, seed: int = 0) -> Trace:
    """English sentences and their German translations of drawn lengths, see `TRANSLATION`."""
    rng, sd, rho = random.Random(seed), TRANSLATION["log_sd"], TRANSLATION["log_correlation"]
    lengths = []
    for _ in range(num):
        common_part, own_part = rng.gauss(0, 1), rng.gauss(0, 1)
        draws = (common_part, rho * common_part + math.sqrt(1 - rho**2) * own_part)
        source, target = (
            # exp of a normal variable has the mean exp(mu + sd^2 / 2).
            max(1, round(TRANSLATION[side] * math.exp(sd * draw - sd**2 / 2)))
            for side, draw in zip(("source", "target"), draws, strict=True)
        )
        # Two more tokens end the source sentence: " =>".
        lengths.append((source + 2, target))
    trace = make_trace("translation", lengths)
    return dataclasses.replace(trace, prefix_tokens=prefix_tokens)
