"""The picture of the pool, and how the terminal shows it."""

import io
import json
from types import SimpleNamespace

import pytest
from rich.console import Console

from jpaged.block_manager import BlockManager
from jpaged.cli import watch
from jpaged.config import SchedulerConfig
from jpaged.pool_view import BlockState, view_pool
from jpaged.request import Request, Sequence
from jpaged.sampling_params import SamplingParams
from jpaged.scheduler import Scheduler

BLOCK_SIZE = 4


def _sequence(manager: BlockManager, name: str, num_tokens: int) -> Sequence:
    seq = Request(name, list(range(num_tokens)), SamplingParams()).sequences[0]
    assert manager.allocate_slots(seq, num_tokens) is not None
    seq.num_computed_tokens = num_tokens
    return seq


@pytest.fixture
def manager() -> BlockManager:
    """Ten usable blocks: two sequences that share one and a half, one block cached, six free."""
    manager = BlockManager(11, BLOCK_SIZE)
    parent = _sequence(manager, "a", 6)
    child = Request("b", list(range(6)), SamplingParams()).sequences[0]
    manager.fork(parent, child)
    ended = Request("c", list(range(40, 44)), SamplingParams()).sequences[0]
    assert manager.allocate_slots(ended, 4) is not None
    ended.num_computed_tokens = 4
    manager.register_full_blocks(ended)
    manager.free(ended)
    alone = _sequence(manager, "d", 7)
    assert alone.block_ids[0] != 3, "empty blocks go before cached ones"
    return manager


def test_states_owners_and_fills(manager):
    view = view_pool(manager)
    assert len(view.states) == len(view.owners) == len(view.fills) == 10
    assert [s.request_id for s in view.sequences] == ["a", "b", "d"]
    a, b, d = view.sequences
    assert a.block_ids == b.block_ids
    for block_id, fill in zip(a.block_ids, (4, 2), strict=True):
        place = block_id - 1
        assert view.states[place] is BlockState.SHARED
        assert (view.owners[place], view.fills[place]) == (0, fill)
    for block_id, fill in zip(d.block_ids, (4, 3), strict=True):
        place = block_id - 1
        assert view.states[place] is BlockState.USED
        assert (view.owners[place], view.fills[place]) == (2, fill)
    counts = {state: view.states.count(state) for state in BlockState}
    stats = manager.stats()
    assert counts[BlockState.SHARED] == stats.shared == 2
    assert counts[BlockState.SHARED] + counts[BlockState.USED] == stats.used == 4
    assert counts[BlockState.CACHED] == 1
    assert counts[BlockState.CACHED] + counts[BlockState.FREE] == stats.free == 6


def test_every_block_is_one_character(manager):
    text = watch.draw_blocks(view_pool(manager), width=8).plain
    first, second = text.split("\n")
    assert (len(first), len(second)) == (8, 2)
    drawn = first + second
    assert [drawn.count(c) for c in "▓░·"] == [2, 1, 5]
    d = view_pool(manager).sequences[2]
    assert [drawn[block_id - 1] for block_id in d.block_ids] == ["█", "▆"]


def test_many_blocks_are_drawn_in_groups():
    manager = BlockManager(4001, BLOCK_SIZE)
    _sequence(manager, "a", 4 * 300)
    text = watch.draw_blocks(view_pool(manager), width=50).plain
    *rows, note = text.split("\n")
    assert note == "one character is 5 blocks"
    assert len(rows) == 16
    assert "".join(rows) == "█" * 60 + "·" * 740


def test_the_whole_picture_names_the_counters(manager):
    scheduler = Scheduler(
        SchedulerConfig(max_num_seqs=2, max_num_batched_tokens=8, max_model_len=32), manager
    )
    llm = SimpleNamespace(
        engine=SimpleNamespace(
            block_manager=manager, stats=lambda: SimpleNamespace(scheduler=scheduler.stats())
        )
    )
    console = Console(width=90, file=io.StringIO(), record=True)
    console.print(watch.render(llm, 90))
    text = console.export_text()
    for expected in (
        "10 blocks of 4 tokens",
        "used 4",
        "shared 2 (saves 2)",
        "cached 1",
        "free 6",
        "wasted slots 18.8 %",
        "a/0 6 tokens in",
        "d/0 7 tokens in",
    ):
        assert expected in text


def test_swapped_blocks_are_counted_where_there_is_a_host_pool():
    manager = BlockManager(11, BLOCK_SIZE, num_host_blocks=5)
    group = Request("a", list(range(6)), SamplingParams()).sequences
    assert manager.allocate_slots(group[0], 6) is not None
    group[0].num_computed_tokens = 6
    assert manager.swap_out(group)
    config = SchedulerConfig(max_num_seqs=2, max_num_batched_tokens=8, max_model_len=32)
    console = Console(width=90, file=io.StringIO(), record=True)
    console.print(watch.counters(Scheduler(config, manager).stats()))
    assert "host used 2 of" in console.export_text()


def test_it_draws_after_steps_and_stops(manager, monkeypatch):
    scheduler = Scheduler(
        SchedulerConfig(max_num_seqs=2, max_num_batched_tokens=8, max_model_len=32), manager
    )
    engine = SimpleNamespace(
        block_manager=manager, stats=lambda: SimpleNamespace(scheduler=scheduler.stats())
    )
    llm = SimpleNamespace(engine=engine, on_step=None)
    shown = io.StringIO()
    monkeypatch.setattr(
        watch, "Console", lambda stderr: Console(file=shown, force_terminal=True, width=80)
    )
    with watch.watching(llm):
        assert llm.on_step is not None
        llm.on_step()
    assert llm.on_step is None
    assert "10 blocks of 4 tokens" in shown.getvalue()


def expand(runs: list[int]) -> tuple[list[int], list[int]]:
    """States and owners of every block."""
    states, owners = [], []
    for state, owner, count in zip(runs[::3], runs[1::3], runs[2::3], strict=True):
        states += [state] * count
        owners += [owner] * count
    return states, owners


def test_plain_data_tells_the_same(manager):
    view = view_pool(manager)
    data = json.loads(json.dumps(view.as_dict()))
    assert (data["block_size"], data["num_blocks"]) == (BLOCK_SIZE, 10)
    assert expand(data["runs"]) == (view.states, view.owners)
    a, _, d = view.sequences
    half, three = a.block_ids[1] - 1, d.block_ids[1] - 1
    (first, fill), (second, other) = sorted([(half, 2), (three, 3)])
    assert data["partial"] == [first, fill, second, other]
    assert data["sequences"] == [["a", 0, 6, 2], ["b", 0, 6, 2], ["d", 0, 7, 2]]
    stats = manager.stats()
    assert data["counts"] == {
        "free": 5,
        "cached": 1,
        "used": 2,
        "shared": 2,
        "saved": stats.saved,
        "wasted_slots": stats.wasted_slots,
    }


def test_plain_data_of_an_empty_pool_is_one_run():
    data = view_pool(BlockManager(100_001, 16)).as_dict()
    assert data["runs"] == [BlockState.FREE, -1, 100_000]
    assert (data["partial"], data["sequences"]) == ([], [])
    assert data["counts"]["free"] == 100_000


def test_plain_data_of_a_full_large_pool_stays_small():
    manager = BlockManager(50_001, BLOCK_SIZE)
    for index in range(100):
        _sequence(manager, str(index), 2000 - 1)
    text = json.dumps(view_pool(manager).as_dict())
    assert len(text) < 10_000
