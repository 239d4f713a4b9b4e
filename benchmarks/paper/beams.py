"""Which beams survive each step: replayed from a real beam search.

`measure_beam_parents.py` recorded the parents that the default model's beam search chose on 16
prompts. A simulated request replays one of those records, from its first step on and over again if
it is longer.
"""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Final

PARENTS_FILE: Final = Path(__file__).parent / "beam_parents.json"
WIDTHS: Final = (2, 4, 6)


@dataclasses.dataclass(frozen=True, slots=True)
class BeamRecord:
    """One recorded search.

    Attributes:
        parents: for each step after the first, the parent of each beam.
        num_replaced: for each such step, the beams that are not continued in place: k less the
            number of different parents.
    """

    parents: list[tuple[int, ...]]
    num_replaced: list[int]


@functools.cache
def load_records(width: int) -> list[BeamRecord]:
    """The records of one beam width.

    Raises:
        ValueError: if none was recorded for that width.
    """
    texts = json.loads(PARENTS_FILE.read_text())["parents"].get(str(width))
    if texts is None:
        raise ValueError(f"width must be one of {WIDTHS}, got {width}")
    records = []
    for text in texts:
        digits = [int(digit) for digit in text]
        parents = [tuple(digits[i : i + width]) for i in range(0, len(digits), width)]
        records.append(BeamRecord(parents, [width - len(set(step)) for step in parents]))
    return records


def record_of(width: int, index: int) -> BeamRecord:
    """The record that the request of that index replays."""
    records = load_records(width)
    return records[index % len(records)]
