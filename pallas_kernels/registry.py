"""Which implementation of an operation runs, chosen by stated predicates and logged once.

A name given explicitly never falls back: what it cannot serve is refused with the reasons. Without
a name the first implementation that has no reason against the problem is taken.
"""

import logging
from collections.abc import Callable
from typing import Literal, get_args

logger = logging.getLogger(__name__)

Implementation = Literal["reference", "xla", "mosaic_gpu", "mosaic_tpu"]
IMPLEMENTATIONS: tuple[str, ...] = get_args(Implementation)

_logged: set[tuple[str, str, str]] = set()


def choose(
    op: str,
    requested: Implementation | None,
    candidates: dict[Implementation, Callable[[], list[str]]],
) -> Implementation:
    """The name of the implementation of `op` to run.

    Args:
        op: Name of the operation, for messages.
        requested: A name that must be honoured, or None to choose.
        candidates: Name to a function giving the reasons why it cannot serve this problem (none:
            it can), in order of preference. `reference` is taken only when asked for.

    Raises:
        ValueError: `requested` is no known name.
        NotImplementedError: `requested` cannot serve the problem, or nothing can.
    """
    if requested is not None:
        if requested not in candidates:
            raise ValueError(f"implementation must be one of {list(candidates)}, got {requested!r}")
        if reasons := candidates[requested]():
            raise NotImplementedError(f"{op}: {requested} cannot run here: {'; '.join(reasons)}")
        return requested
    refused: list[str] = []
    for name, unsupported_reasons in candidates.items():
        if name == "reference":
            continue
        reasons = unsupported_reasons()
        if not reasons:
            why = " and ".join(refused) or "first choice"
            if (op, name, why) not in _logged:
                _logged.add((op, name, why))
                logger.info("%s: %s (%s)", op, name, why)
            return name
        refused.append(f"{name} refused: {'; '.join(reasons)}")
    raise NotImplementedError(f"{op}: no implementation serves this: {'; '.join(refused)}")
