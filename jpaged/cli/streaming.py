"""Running one request to its end in the terminal: text as it comes, Ctrl-C, statistics."""

import argparse
import contextlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from jpaged.sampling_params import SamplingParams


class Timing:
    """How many tokens a request has taken and given, and when.

    Attributes:
        num_prompt_tokens: Tokens of the prompt.
        num_cached_tokens: How many of them came from the prefix cache.
        num_tokens: Tokens generated, all continuations together.
    """

    def __init__(self) -> None:
        self.num_prompt_tokens = 0
        self.num_cached_tokens = 0
        self.num_tokens = 0
        self._start = time.perf_counter()
        self._first: float | None = None
        self._tokens_at_first = 0
        self._last = self._start

    def note(self) -> None:
        """Notes that something has come just now; tokens of it are counted before."""
        self._last = time.perf_counter()
        if self._first is None and self.num_tokens:
            self._first, self._tokens_at_first = self._last, self.num_tokens

    def line(self, end: str) -> str:
        """One line: time to the first token, tokens of the prompt, tokens a second, and the end."""
        cached = f" ({self.num_cached_tokens} cached)" if self.num_cached_tokens else ""
        parts = [f"{self.num_prompt_tokens} prompt tokens{cached}"]
        if self._first is not None:
            parts.append(f"first token after {self._first - self._start:.2f} s")
        speed = ""
        if self._first is not None and self._last > self._first:
            after_first = self.num_tokens - self._tokens_at_first
            speed = f" at {after_first / (self._last - self._first):.1f} tokens/s"
        parts.append(f"{self.num_tokens} tokens{speed}")
        return f"{', '.join(parts)}, ended by {end}"


class Streamed(Timing):
    """What one streamed request has produced so far, and when.

    Attributes:
        texts: The text of each continuation.
        finish_reasons: Why each one ended; None while it goes on or where it was cut short.
    """

    def __init__(self, n: int) -> None:
        super().__init__()
        self.texts = [""] * n
        self.finish_reasons: list[str | None] = [None] * n

    def add(self, output: Any) -> list[str]:
        """Takes in an output that carries what is new; returns the new text of each part."""
        new = [""] * len(self.texts)
        for completion in output.outputs:
            new[completion.index] = completion.text
            self.texts[completion.index] += completion.text
            self.finish_reasons[completion.index] = completion.finish_reason
            self.num_tokens += len(completion.token_ids)
        self.num_prompt_tokens = len(output.prompt_token_ids)
        self.num_cached_tokens = output.num_cached_tokens
        self.note()
        return new

    def summary(self) -> str:
        """The line, with every end that a continuation came to."""
        ends = [reason or "interrupted" for reason in self.finish_reasons]
        return self.line("/".join(dict.fromkeys(ends)))


def stream(
    llm: Any,
    prompt: Any,
    params: SamplingParams,
    *,
    on_text: Callable[[str], None],
    interrupted: Callable[[], bool] = lambda: False,
) -> Streamed:
    """Runs one request, handing on the text of a single continuation as it comes.

    Args:
        llm: The engine.
        prompt: In a form that the engine takes.
        params: With output kind DELTA, or of beam search.
        on_text: Called with each new piece of text if `params.n` is 1.
        interrupted: Asked after each step; once true, the request is aborted.
    """
    streamed = Streamed(params.n)
    outputs = llm.stream(prompt, params)
    # Closing the iterator is what aborts a request that has not finished.
    with contextlib.closing(outputs):
        for output in outputs:
            new = streamed.add(output)
            if params.n == 1 and new[0]:
                on_text(new[0])
            if interrupted():
                break
    return streamed


def write_text(text: str) -> None:
    """Shows text now; what the terminal cannot encode is replaced."""
    try:
        sys.stdout.write(text)
    except UnicodeEncodeError:
        encoding = sys.stdout.encoding or "ascii"
        sys.stdout.write(text.encode(encoding, errors="replace").decode(encoding))
    sys.stdout.flush()


def check_watch(args: argparse.Namespace) -> None:
    """Refuses `--watch` where nobody could see it.

    Raises:
        ValueError: Standard error is no terminal.
    """
    if args.watch and not sys.stderr.isatty():
        raise ValueError("--watch draws on standard error, which must be a terminal")


def watching(args: argparse.Namespace, llm: Any) -> contextlib.AbstractContextManager[None]:
    """Draws the engine's block pool while the context lasts, if `--watch` asks for it."""
    if not args.watch:
        return contextlib.nullcontext()
    # What draws takes 0.1 s to import.
    from jpaged.cli import watch

    return watch.watching(llm)


@contextlib.contextmanager
def ctrl_c_interrupts() -> Iterator[Callable[[], bool]]:
    """Within it the first Ctrl-C only sets a flag, which the yielded function reads.

    The engine is so never cut off in the middle of a step. A second Ctrl-C raises
    KeyboardInterrupt as usual.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    pressed = False

    def handle(signum: int, frame: object) -> None:
        nonlocal pressed
        pressed = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)
