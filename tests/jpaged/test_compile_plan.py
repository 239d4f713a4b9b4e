import subprocess
import sys
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jpaged.compile_plan import CompilePlan, ProgramState, StepShape, step_shapes

SMALL, MIDDLE, LARGE = (StepShape(n, 4, False) for n in (16, 32, 64))
DECODE = StepShape(4, 4, True)
SHAPES = (SMALL, MIDDLE, LARGE)
TIMEOUT_S = 30  # never waited for unless a test fails


@st.composite
def _budgets(draw):
    max_num_seqs = draw(st.integers(1, 300))
    return draw(st.integers(max_num_seqs, 9000)), max_num_seqs


@given(budgets=_budgets(), data=st.data())
def test_every_step_within_the_budgets_has_a_shape(budgets, data):
    max_tokens, max_seqs = budgets
    shapes = step_shapes(max_tokens, max_seqs)
    assert len(set(shapes)) == len(shapes)
    for shape in shapes:
        assert shape.num_tokens <= max_tokens or shape.num_tokens == shape.num_seqs
        assert shape.num_seqs <= max_seqs
    num_seqs = data.draw(st.integers(1, max_seqs))
    num_tokens = data.draw(st.integers(num_seqs, max_tokens))
    plan = CompilePlan(shapes, lambda shape: shape, num_threads=1)
    mixed = plan.find(num_tokens, num_seqs, False).shape
    assert mixed.holds(num_tokens, num_seqs, False)
    assert not mixed.decode_only
    decode = plan.find(num_seqs, num_seqs, True).shape
    assert decode == min(s for s in shapes if s.decode_only and s.num_seqs >= num_seqs)
    assert decode.num_tokens < 2 * num_seqs, "at most every other row is padding"


@pytest.mark.parametrize(
    "budgets", [(1, 1), (7, 3), (16, 16), (17, 5), (33, 33), (100, 9), (512, 32), (1000, 77)]
)
def test_every_single_step_size_fits(budgets):
    max_tokens, max_seqs = budgets
    shapes = step_shapes(max_tokens, max_seqs)
    for num_seqs in range(1, max_seqs + 1):
        assert any(s.holds(num_seqs, num_seqs, True) for s in shapes if s.decode_only)
        for num_tokens in range(num_seqs, max_tokens + 1):
            assert any(s.holds(num_tokens, num_seqs, False) for s in shapes)


def test_an_accelerator_has_fewer_small_shapes():
    shapes = step_shapes(8192, 256, on_accelerator=True)
    assert len(shapes) < 60
    for plain in (False, True):
        of_kind = [s for s in shapes if s.plain == plain]
        assert min(s.num_seqs for s in of_kind) == 8
        assert min(s.num_tokens for s in of_kind if not s.decode_only) == 64
        for num_seqs in (1, 8, 9, 256):
            assert any(s.holds(num_seqs, num_seqs, True, plain) for s in of_kind)
            assert any(s.holds(8192, num_seqs, False, plain) for s in of_kind)


@given(budgets=_budgets(), data=st.data())
def test_an_accelerator_pads_large_plain_steps_little(budgets, data):
    max_tokens, max_seqs = budgets
    plan = CompilePlan(
        step_shapes(max_tokens, max_seqs, on_accelerator=True), lambda shape: shape, num_threads=1
    )
    num_seqs = data.draw(st.integers(1, max_seqs))
    num_tokens = data.draw(st.integers(num_seqs, max_tokens))
    decode = plan.best(num_seqs, num_seqs, True, plain=True).shape
    assert decode.num_seqs < max(2 * num_seqs, 9) if num_seqs <= 128 else 1.5 * num_seqs + 1
    mixed = plan.best(num_tokens, num_seqs, False, plain=True).shape
    assert mixed.plain
    if num_tokens > 1024 > num_seqs:
        assert mixed.num_tokens <= 1.25 * num_tokens


def test_what_a_lone_request_needs_comes_first_on_an_accelerator():
    names = [s.name for s in step_shapes(8192, 256, on_accelerator=True)]
    assert names[:5] == [
        "mixed_64x64_plain",
        "decode_8_plain",
        "mixed_64x64",
        "decode_8",
        "mixed_8192x256",
    ]


def test_programs_can_be_compiled_before_they_are_needed():
    compiled = []

    def compile_shape(shape):
        compiled.append(shape)
        return shape

    plan = CompilePlan(SHAPES, compile_shape, num_threads=2, strict=True)
    plan.compile([plan.best(9, 2, False), plan.best(40, 2, False), plan.best(9, 2, False)])
    assert sorted(compiled) == [SMALL, LARGE]
    plan.compile(plan.programs)
    assert sorted(compiled) == [SMALL, MIDDLE, LARGE]
    assert plan.find(17, 4, False).shape == MIDDLE
    assert plan.num_on_demand == 0


def test_compiling_ahead_raises_what_a_compilation_raised():
    def fail(shape):
        raise RuntimeError(f"no {shape.name}")

    plan = CompilePlan((SMALL,), fail, num_threads=1)
    with pytest.raises(RuntimeError, match="no mixed_16x4"):
        plan.compile(plan.programs)


def test_a_plain_step_runs_in_a_plain_program_where_that_is_ready():
    shapes = step_shapes(64, 8, on_accelerator=True)
    plan = CompilePlan(shapes, lambda shape: shape, num_threads=1)
    assert plan.find(3, 3, True).shape == StepShape(8, 8, True)
    assert plan.find(3, 3, True, True).shape == StepShape(8, 8, True, plain=True)
    assert plan.find(40, 3, False, True).shape == StepShape(64, 8, False, plain=True)
    assert StepShape(8, 8, True).holds(3, 3, True, plain=True)
    assert not StepShape(8, 8, True, plain=True).holds(3, 3, True, plain=False)
    assert StepShape(8, 8, True, plain=True).name == "decode_8_plain"


def test_there_are_few_shapes_and_those_of_a_lone_request_come_first():
    shapes = step_shapes(8192, 256)
    assert len(shapes) < 50
    lone = [s for s in shapes if s.num_seqs <= 8 and s.num_tokens <= 64]
    assert list(shapes[: len(lone)]) == lone
    assert shapes[len(lone)] == StepShape(8192, 256, False), "then the one that holds any step"


def test_a_decode_program_holds_no_chunk():
    assert DECODE.holds(4, 4, True)
    assert not DECODE.holds(4, 4, False)
    assert SMALL.holds(4, 4, True)
    assert not SMALL.holds(17, 4, True)
    assert not SMALL.holds(5, 5, True)


def test_names():
    assert (DECODE.name, SMALL.name) == ("decode_4", "mixed_16x4")
    programs = CompilePlan((DECODE, SMALL), str, 1).programs
    assert [(p.name, p.kind, p.num_tokens, p.num_seqs) for p in programs] == [
        ("decode_4", "decode", 4, 4),
        ("mixed_16x4", "mixed", 16, 4),
    ]


class Compiler:
    """Compiles a shape once the test lets it; records the order."""

    def __init__(self, *failing):
        self.order = []
        self.failing = failing
        self._gates = {}
        self._started = {}
        self._lock = threading.Lock()

    def __call__(self, shape):
        self.order.append(shape)
        self._event(self._started, shape).set()
        assert self._event(self._gates, shape).wait(TIMEOUT_S)
        if shape in self.failing:
            raise RuntimeError(f"cannot compile {shape.name}")
        return f"compiled {shape.name}"

    def let(self, *shapes):
        for shape in shapes:
            self._event(self._gates, shape).set()

    def wait_until_started(self, shape):
        assert self._event(self._started, shape).wait(TIMEOUT_S)

    def _event(self, events, shape):
        with self._lock:
            return events.setdefault(shape, threading.Event())


def _started(shapes, num_threads=1, strict=False, failing=()):
    compiler = Compiler(*failing)
    plan = CompilePlan(shapes, compiler, num_threads, strict)
    plan.start()
    return plan, compiler


def _wait_ready(plan, *shapes):
    with plan._changed:
        assert plan._changed.wait_for(
            lambda: all(_program(plan, s).state is ProgramState.READY for s in shapes), TIMEOUT_S
        )


def _program(plan, shape):
    return next(p for p in plan.programs if p.name == shape.name)


def _in_thread(function, *args):
    """Runs a call in a thread; returns a function that waits for its result."""
    found = []

    def call():
        try:
            found.append(function(*args))
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=call)
    thread.start()

    def join():
        thread.join(TIMEOUT_S)
        assert not thread.is_alive()
        return found[0]

    return join


def test_lazy_compiles_once_and_counts():
    compiled = []
    plan = CompilePlan(SHAPES, lambda s: compiled.append(s) or s.name, num_threads=2)
    program = plan.find(20, 2, False)
    assert (program.shape, program.compiled) == (MIDDLE, "mixed_32x4")
    assert plan.find(25, 1, False) is program
    assert compiled == [MIDDLE]
    assert plan.num_on_demand == 1
    assert not plan.is_warm
    assert program.compile_time_s is not None
    assert [p.state for p in plan.programs] == ["pending", "ready", "pending"]


def test_lazy_compiles_what_fits_best_although_a_larger_one_is_ready():
    plan = CompilePlan((*SHAPES, DECODE), lambda s: s.name, num_threads=2)
    assert plan.find(64, 4, False).shape == LARGE
    assert plan.find(3, 3, True).shape == DECODE
    assert plan.num_on_demand == 2


def test_a_step_runs_in_the_cheapest_ready_program_and_its_own_is_compiled_next():
    plan, compiler = _started((LARGE, MIDDLE, SMALL))
    compiler.let(LARGE)
    _wait_ready(plan, LARGE)
    compiler.wait_until_started(MIDDLE)
    assert plan.find(3, 1, False).shape == LARGE
    compiler.let(MIDDLE)
    _wait_ready(plan, MIDDLE)
    assert plan.find(3, 1, False).shape == MIDDLE
    assert plan.find(40, 1, False).shape == LARGE
    compiler.let(SMALL)
    plan.wait()
    assert plan.find(3, 1, False).shape == SMALL
    assert plan.is_warm
    assert plan.num_on_demand == 0
    plan.stop()


def test_what_is_missing_is_compiled_before_the_rest():
    extra = StepShape(128, 4, False)
    plan, compiler = _started((extra, LARGE, MIDDLE, SMALL))
    compiler.let(extra)
    _wait_ready(plan, extra)
    compiler.wait_until_started(LARGE)  # the next ones wait behind it
    assert plan.find(3, 1, False).shape == extra
    compiler.let(*SHAPES)
    plan.wait()
    assert compiler.order == [extra, LARGE, SMALL, MIDDLE]
    plan.stop()


def test_a_step_that_nothing_holds_waits_for_its_program():
    plan, compiler = _started((SMALL, MIDDLE, LARGE))
    compiler.wait_until_started(SMALL)
    result = _in_thread(plan.find, 50, 1, False)
    compiler.let(*SHAPES)
    assert result().shape == LARGE
    plan.wait()
    plan.stop()


def test_several_threads_compile_at_once():
    plan, compiler = _started(SHAPES, num_threads=3)
    for shape in SHAPES:
        compiler.wait_until_started(shape)  # none has ended yet
    compiler.let(*SHAPES)
    plan.wait()
    assert plan.is_warm
    plan.stop()


def test_a_failure_surfaces_where_its_program_is_needed_and_in_wait():
    plan, compiler = _started(SHAPES, failing=(LARGE,))
    compiler.let(*SHAPES)
    with pytest.raises(RuntimeError, match="cannot compile mixed_64x4"):
        plan.wait()
    assert _program(plan, LARGE).state is ProgramState.FAILED
    assert not plan.is_warm
    assert plan.find(20, 1, False).shape == MIDDLE, "the others serve on"
    with pytest.raises(RuntimeError, match="cannot compile mixed_64x4"):
        plan.find(50, 1, False)
    plan.stop()


def test_a_failure_on_demand_surfaces():
    def fail(shape):
        raise RuntimeError(f"cannot compile {shape.name}")

    plan = CompilePlan(SHAPES, fail, num_threads=1)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="cannot compile mixed_16x4"):
            plan.find(3, 1, False)


def test_a_failure_on_demand_is_forgotten_when_the_next_try_succeeds():
    results = iter([RuntimeError("out of memory"), "compiled"])

    def compile_step(shape):
        result = next(results)
        if isinstance(result, Exception):
            raise result
        return result

    plan = CompilePlan([SMALL], compile_step, num_threads=1)
    with pytest.raises(RuntimeError, match="out of memory"):
        plan.find(3, 1, False)
    assert plan.find(3, 1, False).compiled == "compiled"


def test_a_process_that_ends_waits_for_the_compilation_under_way():
    script = """
import threading
import time

from jpaged.compile_plan import CompilePlan, StepShape

started = threading.Event()


def compile_step(shape):
    started.set()
    time.sleep(0.2)
    print("compiled", shape.name, flush=True)


CompilePlan([StepShape(n, n, True) for n in (1, 2)], compile_step, num_threads=1).start()
started.wait()
"""
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stdout) == (0, "compiled decode_1\n"), ended.stderr


def test_strict_forbids_compiling_on_demand():
    plan = CompilePlan(SHAPES, lambda shape: shape.name, num_threads=1, strict=True)
    with pytest.raises(RuntimeError, match="strict_compilation forbids compiling mixed_16x4 now"):
        plan.find(3, 1, False)
    assert plan.num_on_demand == 1


def test_strict_lets_the_plan_be_worked_through():
    plan, compiler = _started(SHAPES, strict=True)
    compiler.let(*SHAPES)
    plan.wait()
    assert plan.find(3, 1, False).shape == SMALL
    plan.stop()


def test_stop_waits_for_what_is_under_way_and_drops_the_rest():
    plan, compiler = _started(SHAPES)
    compiler.wait_until_started(SMALL)
    stopped = _in_thread(plan.stop)
    compiler.let(SMALL)
    stopped()
    assert [p.state for p in plan.programs] == ["ready", "pending", "pending"]
    assert compiler.order == [SMALL]
    plan.wait()  # returns, although not all is compiled
    plan.stop()


def test_stop_ends_a_wait_for_what_will_never_be_compiled():
    plan, compiler = _started(SHAPES)
    compiler.wait_until_started(SMALL)
    waiting = _in_thread(plan.wait)
    finding = _in_thread(plan._demand, _program(plan, LARGE))
    stopped = _in_thread(plan.stop)
    # The queue is emptied under the lock, so nothing new starts once it is.
    with plan._changed:
        assert plan._changed.wait_for(lambda: plan._stopping, TIMEOUT_S)
    compiler.let(*SHAPES)
    stopped()
    assert waiting() is None
    error = finding()
    # Had the demand come after the end, it would have compiled by itself.
    assert isinstance(error, RuntimeError) or error.shape == LARGE


def test_after_stop_programs_are_compiled_on_demand():
    plan, compiler = _started(SHAPES)
    compiler.let(*SHAPES)
    compiler.wait_until_started(SMALL)
    plan.stop()
    assert plan.find(50, 1, False).shape == LARGE


def test_a_step_larger_than_the_plan_is_refused():
    plan = CompilePlan(SHAPES, lambda shape: shape.name, num_threads=1)
    for size in ((65, 1), (3, 5)):
        with pytest.raises(ValueError, match="no program of the compile plan holds a step of"):
            plan.find(*size, False)


def test_other_programs_are_compiled_last_and_found_by_name():
    plan = CompilePlan([SMALL], lambda shape: shape.name, 1, others={"init_row": lambda: "row"})
    assert [(p.name, p.kind, p.num_tokens, p.num_seqs) for p in plan.programs][-1] == (
        "init_row",
        "row",
        0,
        1,
    )
    assert plan.get("init_row") == "row"
    assert plan.num_on_demand == 1
    plan.start()
    plan.wait()
    assert plan.is_warm
    plan.stop()


def test_strict_forbids_compiling_another_program_on_demand():
    others = {"init_row": lambda: "row"}
    plan = CompilePlan([SMALL], lambda shape: shape.name, 1, strict=True, others=others)
    with pytest.raises(RuntimeError, match="strict_compilation forbids compiling init_row"):
        plan.get("init_row")
