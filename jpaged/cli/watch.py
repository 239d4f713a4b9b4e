"""`jpaged generate --watch`: the block pool in the terminal while requests run.

Drawn on standard error, so that results on standard output stay what they are.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from jpaged.pool_view import BlockState, PoolView, view_pool

REFRESHES_A_SECOND = 10
_MAX_ROWS = 16
_MAX_SEQUENCES = 8
_COLOURS = ("green", "cyan", "yellow", "blue", "bright_red", "bright_green", "bright_cyan", "red")
_LEVELS = "▁▂▃▄▅▆▇█"
_SHARED, _CACHED, _FREE = "▓", "░", "·"


@contextmanager
def watching(llm: Any) -> Iterator[None]:
    """Shows the engine's pool after its steps while the context lasts."""
    console = Console(stderr=True)
    with Live(console=console, auto_refresh=False, redirect_stdout=False) as live:
        shown = 0.0

        def show() -> None:
            live.update(render(llm, console.width), refresh=True)

        def on_step() -> None:
            nonlocal shown
            now = time.monotonic()
            if now - shown >= 1 / REFRESHES_A_SECOND:
                shown = now
                show()

        llm.on_step = on_step
        try:
            yield
        finally:
            llm.on_step = None
            show()


def render(llm: Any, width: int) -> RenderableType:
    """The pool, its counters and the sequences, as they are now."""
    engine = llm.engine
    view = view_pool(engine.block_manager)
    return Panel(
        Group(
            draw_blocks(view, max(width - 4, 8)),
            Text(),
            counters(engine.stats().scheduler),
            sequences(view, max(width - 4, 8)),
        ),
        title=f"{len(view.states)} blocks of {view.block_size} tokens",
        title_align="left",
    )


def draw_blocks(view: PoolView, width: int) -> Text:
    """One character a block, or a group of blocks where there are too many for `_MAX_ROWS`.

    A used block is as high as it is full, in its sequence's colour; a group as high as the share of
    its blocks that are used.
    """
    count = len(view.states)
    group = max(1, -(-count // (width * _MAX_ROWS)))
    text = Text()
    for cell, start in enumerate(range(0, count, group)):
        if cell and cell % width == 0:
            text.append("\n")
        text.append(*_cell(view, start, min(start + group, count)))
    if group > 1:
        text.append(f"\none character is {group} blocks", style="dim")
    return text


def _cell(view: PoolView, start: int, stop: int) -> tuple[str, str]:
    """Character and style of a group of blocks: of what there is most worth seeing in it."""
    states = view.states[start:stop]
    state = max(states)
    if state is BlockState.FREE:
        return _FREE, "dim"
    if state is BlockState.CACHED:
        return _CACHED, "blue"
    if state is BlockState.SHARED:
        return _SHARED, "bold magenta"
    first = start + states.index(BlockState.USED)
    if stop - start == 1:
        share = view.fills[first] / view.block_size
    else:
        share = sum(s is BlockState.USED for s in states) / len(states)
    return _LEVELS[round(share * (len(_LEVELS) - 1))], _colour(view.owners[first])


def _colour(sequence: int) -> str:
    return _COLOURS[sequence % len(_COLOURS)]


def counters(stats: Any) -> Table:
    """The counters of scheduler and block manager."""
    blocks = stats.blocks
    waste = blocks.wasted_slots / blocks.allocated_slots if blocks.allocated_slots else 0.0
    queried = blocks.prefix_queried_tokens
    hits = blocks.prefix_hit_tokens / queried if queried else 0.0
    table = Table.grid(padding=(0, 3))
    table.add_row(
        Text(f"used {blocks.used}", "green"),
        Text(f"{_SHARED} shared {blocks.shared} (saves {blocks.saved})", "magenta"),
        Text(f"{_CACHED} cached {blocks.cached}", "blue"),
        Text(f"{_FREE} free {blocks.free}", "dim"),
    )
    table.add_row(
        f"wasted slots {100 * waste:.1f} %",
        f"copied {blocks.copies}",
        f"prefix hits {100 * hits:.0f} %",
        f"preempted {stats.num_preemptions}",
    )
    table.add_row(
        f"running {stats.num_running_seqs}",
        f"waiting {stats.num_waiting}",
        f"evicted {blocks.evictions}",
        f"steps {stats.num_steps}",
    )
    if blocks.host_blocks:
        table.add_row(
            f"swapped {stats.num_swapped}",
            f"host used {blocks.host_used} of {blocks.host_blocks}",
            f"to host {blocks.swapped_out}",
            f"from host {blocks.swapped_in}",
        )
    return table


def sequences(view: PoolView, width: int) -> RenderableType:
    """The first sequences and their block tables."""
    lines = []
    for index, seq in enumerate(view.sequences[:_MAX_SEQUENCES]):
        line = Text(f"█ {seq.request_id}/{seq.seq_index} ", _colour(index))
        line.append(f"{seq.num_tokens} tokens in ", "default")
        for block_id in seq.block_ids:
            is_shared = view.states[block_id - 1] is BlockState.SHARED
            line.append(f"{block_id} ", "bold magenta" if is_shared else "default")
        line.truncate(width, overflow="ellipsis")
        lines.append(line)
    if len(view.sequences) > _MAX_SEQUENCES:
        lines.append(Text(f"and {len(view.sequences) - _MAX_SEQUENCES} more", "dim"))
    return Group(*lines)
