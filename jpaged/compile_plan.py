"""Which padded step shapes exist, why those, and the threads that compile them ahead of need.

The only module that knows the shapes. A step runs in the cheapest compiled program that holds it,
so that serving starts as soon as any fitting program is there while the rest still compiles; a
step that nothing compiled can hold waits for its own program, which is then compiled first.
"""

import bisect
import concurrent.futures
import dataclasses
import enum
import functools
import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from jpaged import platform

logger = logging.getLogger(__name__)

MIN_CHUNK_TOKENS = 16
MIN_MIXED_SEQS = 8


@dataclasses.dataclass(frozen=True, slots=True, order=True)
class StepShape:
    """Padded size of a step and what it leaves out.

    Attributes:
        num_tokens: flat tokens.
        num_seqs: sequences.
        decode_only: whether every sequence decodes, so that tokens are sequences.
        plain: whether every sequence takes its most likely token, or draws from all of them, and
            asks for nothing else, and no block is copied.
    """

    num_tokens: int
    num_seqs: int
    decode_only: bool
    plain: bool = False

    @property
    def name(self) -> str:
        """How the shape is called in lists and logs."""
        suffix = "_plain" if self.plain else ""
        if self.decode_only:
            return f"decode_{self.num_seqs}{suffix}"
        return f"mixed_{self.num_tokens}x{self.num_seqs}{suffix}"

    @property
    def num_copies(self) -> int:
        """Blocks that may be copied in a step: a sequence copies at most the one it writes to."""
        return 0 if self.plain else self.num_seqs

    def holds(self, num_tokens: int, num_seqs: int, decode_only: bool, plain: bool = False) -> bool:
        """Whether a step of this real size fits."""
        return (
            num_tokens <= self.num_tokens
            and num_seqs <= self.num_seqs
            and (decode_only or not self.decode_only)
            and (plain or not self.plain)
        )


def _powers(start: int, stop: int, factor: int) -> list[int]:
    """`start`, `start * factor`, … below `stop`, and `stop` itself."""
    sizes = []
    while start < stop:
        sizes.append(start)
        start *= factor
    return [*sizes, stop]


def _finer(sizes: list[int], above: int, pieces: int) -> list[int]:
    """Sizes with every step above a size cut into equal pieces."""
    cut = [
        low + (high - low) * piece // pieces
        for low, high in itertools.pairwise(sizes)
        if low >= above
        for piece in range(1, pieces)
    ]
    return sorted({*sizes, *cut})


def step_shapes(
    max_num_batched_tokens: int, max_num_seqs: int, *, on_accelerator: bool = False
) -> tuple[StepShape, ...]:
    """Every shape a step may have, in the order in which they are worth compiling.

    Decode steps pad their sequences to a power of two. Mixed steps pad their tokens to a power of
    two, since a chunk's cost follows them, and their sequences to a power of eight, since those
    cost only the last layer's logits; none has more sequences than tokens (a step of few tokens in
    which many sequences fork takes one with more tokens).

    Args:
        max_num_batched_tokens: Tokens of the largest step.
        max_num_seqs: Sequences of the largest step.
        on_accelerator: Small steps cost an accelerator as much as somewhat larger ones, so there
            are fewer of them; large ones are bound by their products, so padding costs as much as
            tokens do, and there are more. Every shape comes a second time for plain steps, and
            those between powers of two for them only: the conditions of the full sampler make the
            host wait for the step.
    """
    min_tokens, min_seqs, min_decodes = MIN_CHUNK_TOKENS, MIN_MIXED_SEQS, 1
    if on_accelerator:
        min_tokens, min_seqs, min_decodes = 64, 64, 8
    decodes = _powers(min(min_decodes, max_num_seqs), max_num_seqs, 2)
    seq_sizes = _powers(min(min_seqs, max_num_seqs), max_num_seqs, 8)
    token_sizes = _powers(min(min_tokens, max_num_batched_tokens), max_num_batched_tokens, 2)
    first, rest = _shapes(decodes, seq_sizes, token_sizes)
    if not on_accelerator:
        return (*first, *rest)
    decodes = _finer(_finer(decodes, above=128, pieces=2), above=512, pieces=2)
    token_sizes = _finer(_finer(token_sizes, above=256, pieces=2), above=1024, pieces=2)
    first_plain, rest_plain = (
        [dataclasses.replace(shape, plain=True) for shape in shapes]
        for shapes in _shapes(decodes, seq_sizes, token_sizes, min_seqs_of_tokens=1 / 16)
    )
    return (*first_plain, *first, *rest, *rest_plain)


def largest_shape(shapes: Iterable[StepShape]) -> StepShape:
    """The step that needs the most memory beside its arguments: the pool is sized by it."""
    return max(shapes, key=lambda s: (s.num_tokens, s.num_seqs, not s.plain))


def _shapes(
    decodes: list[int],
    seq_sizes: list[int],
    token_sizes: list[int],
    min_seqs_of_tokens: float = 0.0,
) -> tuple[list[StepShape], list[StepShape]]:
    """All shapes of these sizes: those that a lone request needs, and the others.

    Args:
        decodes: Sequences of the steps that only decode.
        seq_sizes: Sequences of the others.
        token_sizes: Tokens of the others.
        min_seqs_of_tokens: A mixed step has at least so many sequences a token, if there may be so
            many: fewer would hardly be cheaper.
    """
    decode = [StepShape(n, n, True) for n in decodes]
    mixed = [
        StepShape(tokens, seqs, False)
        for tokens in token_sizes
        for seqs in seq_sizes
        if min(tokens * min_seqs_of_tokens, seq_sizes[-1]) <= seqs <= max(tokens, seq_sizes[0])
    ]
    first = [s for s in mixed if s.num_seqs == seq_sizes[0] and s.num_tokens <= 64]
    first += [s for s in decode if s.num_seqs <= MIN_MIXED_SEQS]
    # The largest mixed shape holds any step, so it comes first of the others.
    return first, [s for s in (*reversed(mixed), *reversed(decode)) if s not in first]


class ProgramState(enum.StrEnum):
    """Where a program of the plan stands."""

    PENDING = "pending"
    COMPILING = "compiling"
    READY = "ready"
    FAILED = "failed"


@dataclasses.dataclass(slots=True, eq=False)
class Program:
    """One compiled program and how it came to be."""

    name: str
    compile: Callable[[], Any]
    state: ProgramState = ProgramState.PENDING
    compiled: Any = None
    compile_time_s: float | None = None
    error: BaseException | None = None

    @property
    def num_tokens(self) -> int:
        """Padded flat tokens of a step; 0 where there are none."""
        return 0

    @property
    def num_seqs(self) -> int:
        """Padded sequences."""
        return 1

    @property
    def kind(self) -> str:
        """`decode` or `mixed` for steps, `row` for what prepares one sequence."""
        return "row"


@dataclasses.dataclass(slots=True, eq=False)
class StepProgram(Program):
    """The program of one step shape."""

    shape: StepShape = dataclasses.field(kw_only=True)

    @property
    def num_tokens(self) -> int:
        """Padded flat tokens."""
        return self.shape.num_tokens

    @property
    def num_seqs(self) -> int:
        """Padded sequences."""
        return self.shape.num_seqs

    @property
    def kind(self) -> str:
        """`decode` or `mixed`."""
        return "decode" if self.shape.decode_only else "mixed"


class CompilePlan:
    """All programs of an engine, compiled by `num_threads` threads or on demand.

    Args:
        shapes: The steps' shapes, in order of compilation.
        compile_step: Compiles one shape; called from several threads.
        others: Names of programs that are no steps, and how to compile them; they come last.
        num_threads: Threads of the background compilation.
        strict: Whether compiling on demand is an error.
    """

    def __init__(
        self,
        shapes: Sequence[StepShape],
        compile_step: Callable[[StepShape], Any],
        num_threads: int,
        strict: bool = False,
        others: Mapping[str, Callable[[], Any]] | None = None,
    ) -> None:
        steps = [
            StepProgram(shape.name, functools.partial(compile_step, shape), shape=shape)
            for shape in shapes
        ]
        self._others = {name: Program(name, compile) for name, compile in (others or {}).items()}
        self.programs: list[Program] = [*steps, *self._others.values()]
        self._queue: list[Program] = list(self.programs)
        self._changed = threading.Condition()
        self._num_threads = num_threads
        self._strict = strict
        self._threads: list[threading.Thread] = []
        self._stopping = False
        self._by_cost = sorted(steps, key=lambda program: _cost(program.shape))
        self._costs = [_cost(program.shape) for program in self._by_cost]
        self.num_on_demand = 0

    def start(self) -> None:
        """Starts compiling everything in the background."""
        # Python does not wait for these threads, and XLA aborts a process that ends during a
        # compilation.
        platform.call_at_exit(self.stop)
        for i in range(self._num_threads):
            thread = threading.Thread(target=self._work, name=f"jpaged-compile-{i}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def wait(self) -> None:
        """Blocks until every program is compiled or `stop`; raises what a compilation raised."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopping or all(map(_is_over, self.programs)))
        for program in self.programs:
            if program.error is not None:
                raise program.error

    @property
    def is_warm(self) -> bool:
        """Whether every program is compiled."""
        return all(program.state is ProgramState.READY for program in self.programs)

    def stop(self) -> None:
        """Ends the background compilation; a compilation under way is waited for."""
        with self._changed:
            self._stopping = True
            self._queue.clear()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        self._threads.clear()

    def compile(self, programs: Iterable[Program]) -> None:
        """Compiles these now, by as many threads as the plan has; for a plan that was not started.

        Raises:
            Exception: What the first compilation that failed raised.
        """
        with self._changed:
            pending = [p for p in dict.fromkeys(programs) if p.state is ProgramState.PENDING]
            for program in pending:
                self._take(program)
        with concurrent.futures.ThreadPoolExecutor(self._num_threads) as pool:
            list(pool.map(self._run, pending))
        for program in pending:
            if program.error is not None:
                raise program.error

    def find(
        self, num_tokens: int, num_seqs: int, decode_only: bool, plain: bool = False
    ) -> StepProgram:
        """The cheapest compiled program that holds the step, compiled now if there is none.

        Raises:
            ValueError: No shape of the plan is large enough.
        """
        program = self.choose(num_tokens, num_seqs, decode_only, plain)
        self.require(program)
        return program

    def choose(
        self, num_tokens: int, num_seqs: int, decode_only: bool, plain: bool = False
    ) -> StepProgram:
        """The program that `find` returns, but not compiled yet if there is no compiled one.

        Raises:
            ValueError: No shape of the plan is large enough.
        """
        holding = self._holding(num_tokens, num_seqs, decode_only, plain)
        ideal = next(holding)
        if ideal.state is ProgramState.READY:
            return ideal
        # Without threads nothing would ever compile the right one.
        for program in holding if self._threads else ():
            if program.state is ProgramState.READY:
                self._hurry(ideal)
                return program
        return ideal

    def best(
        self, num_tokens: int, num_seqs: int, decode_only: bool, plain: bool = False
    ) -> StepProgram:
        """The cheapest program that holds the step, compiled or not.

        Raises:
            ValueError: No shape of the plan is large enough.
        """
        return next(self._holding(num_tokens, num_seqs, decode_only, plain))

    def _holding(
        self, num_tokens: int, num_seqs: int, decode_only: bool, plain: bool
    ) -> Iterator[StepProgram]:
        """The programs that hold the step, cheapest first; at least one."""
        is_held = False
        start = bisect.bisect_left(self._costs, (num_tokens, False, num_seqs, False))
        for program in self._by_cost[start:]:
            if program.shape.holds(num_tokens, num_seqs, decode_only, plain):
                is_held = True
                yield program
        if not is_held:
            raise ValueError(
                f"no program of the compile plan holds a step of {num_tokens} tokens and "
                f"{num_seqs} sequences"
            )

    def get(self, name: str) -> Any:
        """What one of the `others` was compiled to, compiled now if it is not yet."""
        program = self._others[name]
        self.require(program)
        return program.compiled

    def require(self, program: Program) -> None:
        """Returns when a program is compiled, now if it is not yet."""
        if program.state is not ProgramState.READY:
            self._demand(program)

    def step_program(self, name: str) -> StepProgram:
        """The step program of a name."""
        return next(program for program in self._by_cost if program.name == name)

    def _hurry(self, program: Program) -> None:
        """Makes `program` the next that a thread takes."""
        with self._changed:
            if program in self._queue:
                self._queue.remove(program)
                self._queue.insert(0, program)

    def _demand(self, program: Program) -> None:
        """Returns when the program is compiled."""
        if self._threads:
            self._hurry(program)
        else:
            self.num_on_demand += 1
            if self._strict:
                raise RuntimeError(f"strict_compilation forbids compiling {program.name} now")
            logger.info("compiling %s on demand", program.name)
            with self._changed:
                self._take(program)
            self._run(program)
        with self._changed:
            self._changed.wait_for(lambda: _is_over(program) or self._is_given_up(program))
        if program.error is not None:
            raise program.error
        if program.state is not ProgramState.READY:
            raise RuntimeError(f"the compile plan was stopped before {program.name} was compiled")

    def _is_given_up(self, program: Program) -> bool:
        return self._stopping and program.state is ProgramState.PENDING

    def _take(self, program: Program) -> None:
        if program in self._queue:
            self._queue.remove(program)
        program.state = ProgramState.COMPILING

    def _work(self) -> None:
        while True:
            with self._changed:
                if self._stopping or not self._queue:
                    return
                program = self._queue[0]
                self._take(program)
            self._run(program)

    def _run(self, program: Program) -> None:
        start = time.perf_counter()
        program.error = None
        try:
            program.compiled = program.compile()
            state = ProgramState.READY
        except Exception as error:
            program.error = error
            state = ProgramState.FAILED
            logger.exception("compiling %s failed", program.name)
        with self._changed:
            program.compile_time_s = time.perf_counter() - start
            program.state = state
            self._changed.notify_all()


def _is_over(program: Program) -> bool:
    return program.state in (ProgramState.READY, ProgramState.FAILED)


def _cost(shape: StepShape) -> tuple[int, bool, int, bool]:
    # The wait of a program that is not plain costs more than the logits of some more sequences.
    return (shape.num_tokens, not shape.plain, shape.num_seqs, not shape.decode_only)
