"""`jpaged chat`: a conversation in the terminal, or over a pipe."""

import argparse
import contextlib
import importlib.util
import sys
from collections.abc import Callable
from typing import Any, Protocol

from jpaged.cli import engine, prompts
from jpaged.cli.parser import CHAT_MAX_TOKENS, CHAT_TEMPERATURE
from jpaged.cli.streaming import ctrl_c_interrupts, stream, write_text
from jpaged.sampling_params import SamplingParams

_PROMPT = "> "
_HELP = """\
/reset  forget the conversation
/help   show this list
/exit   leave (or Ctrl-D)
Ctrl-C cuts an answer short."""


class Talk(Protocol):
    """A conversation, wherever its answers come from."""

    def reset(self) -> None:
        """Forgets everything but the system message."""
        ...

    def answer(self, text: str) -> str:
        """Shows the answer to `text` as it comes and remembers both; returns a summary line.

        Raises:
            ValueError: There is no answer, and `text` is not remembered.
        """
        ...


def run(args: argparse.Namespace) -> int:
    """Runs the command until the input ends and returns its exit code."""
    if args.url is not None:
        from jpaged.cli import remote_chat

        return remote_chat.run(args)
    for flag, value in (("--api-key", args.api_key), ("--model-name", args.model_name)):
        if value is not None:
            raise ValueError(f"{flag} needs --url")
    options = engine.sampling_options(
        args, max_tokens=CHAT_MAX_TOKENS, temperature=CHAT_TEMPERATURE
    )
    params = engine.sampling_params(options, delta=True)
    with engine.make_llm(engine.LONE_REQUEST | engine.engine_options(args)) as llm:
        if not prompts.has_chat_template(llm):
            raise ValueError("chat needs a model with a chat template: use jpaged generate --raw")
        talk(Conversation(llm, params, args.system), show_stats=args.stats)
    return 0


def talk(conversation: Talk, *, show_stats: bool) -> None:
    """Reads lines and shows answers until the input ends."""
    read_line = _line_reader()
    if sys.stdin.isatty():
        write_text("Type a message; /help lists the commands.\n")
    while True:
        try:
            line = read_line().strip()
        except KeyboardInterrupt:
            write_text("\n(/exit or Ctrl-D leaves)\n")
            continue
        except EOFError:
            return
        if line == "/exit":
            return
        _handle(conversation, line, show_stats=show_stats)


def _handle(conversation: Talk, line: str, *, show_stats: bool) -> None:
    if line == "/reset":
        conversation.reset()
        print("jpaged: conversation forgotten", file=sys.stderr)
    elif line == "/help":
        print(_HELP, file=sys.stderr)
    elif line.startswith("/"):
        print(f"jpaged: unknown command {line.split()[0]}, see /help", file=sys.stderr)
    elif line:
        try:
            summary = conversation.answer(line)
        except ValueError as error:
            print(f"jpaged: error: {error} (/reset starts anew)", file=sys.stderr)
        else:
            if show_stats:
                print(f"jpaged: {summary}", file=sys.stderr)


class Conversation:
    """What was said so far, and the engine that continues it.

    Args:
        llm: The engine.
        params: Sampling parameters of every answer.
        system: System message, or None.
    """

    def __init__(self, llm: Any, params: SamplingParams, system: str | None) -> None:
        self._llm = llm
        self._params = params
        self._opening = [{"role": "system", "content": system}] if system is not None else []
        self.messages: list[dict[str, str]] = list(self._opening)

    def reset(self) -> None:
        """See `Talk`."""
        self.messages = list(self._opening)

    def answer(self, text: str) -> str:
        """See `Talk`; the engine refuses a conversation that has become too long."""
        messages = [*self.messages, {"role": "user", "content": text}]
        prompt = prompts.from_messages(self._llm, messages)
        self._llm.validate_request(prompt, self._params)
        with ctrl_c_interrupts() as interrupted:
            streamed = stream(
                self._llm, prompt, self._params, on_text=write_text, interrupted=interrupted
            )
        write_text("\n")
        self.messages = [*messages, {"role": "assistant", "content": streamed.texts[0]}]
        return streamed.summary()


def _line_reader() -> Callable[[], str]:
    """What reads the next line: with editing and history in a terminal, bare over a pipe."""
    if not sys.stdin.isatty():
        return lambda: input("")
    if importlib.util.find_spec("prompt_toolkit") is not None:
        from prompt_toolkit import PromptSession

        session = PromptSession()
        return lambda: session.prompt(_PROMPT)
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # gives input() its editing and history
    return lambda: input(_PROMPT)
