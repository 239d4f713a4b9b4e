"""Reading a schedule of the TPU compiler."""

import pytest

from benchmarks.tpu_static import Loop, Walk, read_loops, rotation_cycles, tile_cycles

SCHEDULE = """\
= control target key start
LB: loop body
= control target key end
     0   :  { %s1 = smov.u32 0 }
   0x1 LB: > { %v2 = vmatmul.bf16 %v1 /* vmatmul } of
a comment */  ;;  %v3 = vadd %v1 }
   0x2   : > { }
   0x3   : >> { %s4 = sadd.s32 1 }
   0x4   : >> { %5 = sbr.rel (!%p1) target bundleno = 3 (0x3) }
   0x5   : > { %6 = sbr.rel (%p2) target bundleno = 1 (0x1) }
   0x6   :  { }
"""
UTILIZATION = """\
== CAPACITY:
MATMUL, VALU
2 4
== UTILIZATION:
0 0
1 1
0 0
0 0
0 0
0 0
0 0
"""


def test_an_outer_loop_leaves_out_the_inner_one():
    outer, inner = read_loops(SCHEDULE, UTILIZATION, delay_slots=0)
    assert (outer.first, outer.last, outer.own_cycles, outer.empty) == (1, 5, 3, 1)
    assert outer.matmuls == 1
    assert outer.slot_use == {"MATMUL": pytest.approx(1 / 6, abs=1e-3), "VALU": 0.083}
    assert (inner.first, inner.last, inner.matmuls) == (3, 4, 0)


def test_delay_slots_belong_to_the_loop():
    outer, _ = read_loops(SCHEDULE, UTILIZATION, delay_slots=1)
    assert outer.last == 6


def test_files_of_two_compilations():
    with pytest.raises(ValueError, match="7 bundles in the schedule, 6 in the utilization"):
        read_loops(SCHEDULE, UTILIZATION.removesuffix("0 0\n"), delay_slots=0)


def _loop(first, last, cycles, matmuls=0):
    return Loop(
        first=first,
        last=last,
        own_cycles=cycles,
        empty=0,
        matmuls=matmuls,
        slot_use={"MATMUL": 0.5},
    )


def test_tile_has_all_bundles_of_its_loops():
    loops = [
        _loop(0, 900, 50),
        _loop(100, 800, 70),
        _loop(110, 119, 9),
        _loop(120, 330, 200),
        _loop(400, 500, 100, matmuls=40),
        _loop(510, 550, 30),
        _loop(600, 660, 60, matmuls=20),
        _loop(850, 860, 10),
    ]
    assert tile_cycles(loops, Walk(tokens=128))["tile_cycles"] == 100
    walk = Walk(tokens=128, turns=2, has_outer=True, masked_turns=4)
    assert tile_cycles(loops, walk) == {
        "tile_cycles": 70 + 2 * 100,
        "masked_tile_cycles": 70 + 4 * 60 + 2 * 30,
        "item_cycles": 8 * 200 + 16 * 9,
        "slot_use": {"MATMUL": 0.5},
    }


def test_a_token_of_the_rotation_has_its_part_of_both_loops():
    assert rotation_cycles([_loop(3, 9, 32), _loop(1, 10, 64)])["cycles_per_token"] == 2.5
