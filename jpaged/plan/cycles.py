"""The TPU compiler's own estimate of a program's time, from the text of the compiled program.

XLA writes into every fusion and copy how many cycles it thinks they take, memory included. Pallas
kernels, collectives and copies that run beside other work carry none.
"""

import re

# What XLA writes where it does not know.
_UNKNOWN = 2**63 - 1
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) .*\{$")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_BODY = re.compile(r"\bbody=%?([\w.-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_TRUE_FALSE = re.compile(r"\b(?:true|false)_computation=%?([\w.-]+)")


def estimated_cycles(hlo: str) -> int:
    """Cycles of one run of a program.

    Loops count as often as they are known to run, or once; of conditionals the shortest branch
    counts, since those of a step are taken for rare requests.

    Args:
        hlo: The optimised program as text.

    Raises:
        ValueError: It has no entry computation.
    """
    entry, bodies = None, {}
    lines: list[str] = []
    for line in hlo.splitlines():
        if line[:1].isspace() or not line:
            lines.append(line)
        elif match := _COMPUTATION.match(line):
            lines = []
            bodies[match[2]] = lines
            entry = match[2] if match[1] else entry
    if entry is None:
        raise ValueError("the program has no entry computation")
    return _cycles_of(entry, bodies)


def _cycles_of(name: str, bodies: dict[str, list[str]]) -> int:
    total = 0
    for line in bodies.get(name, ()):
        if match := _CYCLES.search(line):
            total += int(match[1]) if int(match[1]) != _UNKNOWN else 0
        if " while(" in line and (body := _BODY.search(line)):
            trips = _TRIPS.search(line)
            total += (int(trips[1]) if trips else 1) * _cycles_of(body[1], bodies)
        elif " conditional(" in line:
            branches = _TRUE_FALSE.findall(line)
            if listed := _BRANCHES.search(line):
                branches = [branch.strip(" %") for branch in listed[1].split(",")]
            total += min((_cycles_of(branch, bodies) for branch in branches), default=0)
    return total
