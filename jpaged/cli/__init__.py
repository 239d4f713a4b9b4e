"""The `jpaged` command: reads arguments, calls the public API, prints.

Nothing heavy is imported before a command needs it: `jpaged --help` starts no JAX. Text that was
asked for goes to standard output, everything about it to standard error. Exit codes: 0 all went
well, 1 some rows of a batch failed, `doctor` found a fault or `plan` nothing that fits, 2 a mistake
of the caller or an error of the engine, 130 interrupted.
"""

import os
import sys
from collections.abc import Sequence

from jpaged.cli import follow
from jpaged.cli.parser import build_parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` (the process's own if None) and returns the exit code."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        return 0
    try:
        return _run(args)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader left (`| head`): nothing to say, and nothing more may be flushed at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, NotImplementedError, RuntimeError, ImportError, OSError) as error:
        if args.debug:
            raise
        print(f"jpaged: error: {_one_line(error)}", file=sys.stderr)
        return 2


def _run(args) -> int:
    if follow.is_wanted(args):
        return follow.run(args)
    match args.command:
        case "generate":
            from jpaged.cli import generate as command
        case "chat":
            from jpaged.cli import chat as command
        case "compile":
            from jpaged.cli import compile as command
        case "plan":
            from jpaged.cli import plan as command
        case "serve":
            from jpaged.cli import serve as command
        case "run-batch":
            from jpaged.cli import run_batch as command
        case "bench":
            from jpaged.cli import bench as command
        case _:
            from jpaged.cli import doctor as command
    return command.run(args)


def _one_line(error: BaseException) -> str:
    first, _, rest = (str(error).strip() or type(error).__name__).partition("\n")
    return f"{first} (--debug shows the rest)" if rest else first
