"""The flags of `jpaged generate` that say what form the output must have."""

import argparse
from pathlib import Path
from typing import Any

from jpaged.structured_outputs_params import StructuredOutputsParams


def add_flags(command: argparse.ArgumentParser, dest: str) -> None:
    """Adds them to a command; the one that is given puts its fields into `dest`.

    Args:
        command: The parser of the command.
        dest: Name of the attribute that gets the fields of `StructuredOutputsParams`.
    """
    group = command.add_argument_group("form of the output (one of these)")
    flags = group.add_mutually_exclusive_group()
    flags.add_argument(
        "--json-schema",
        dest=dest,
        type=_schema,
        metavar="FILE|JSON",
        help="JSON that this schema allows",
    )
    flags.add_argument(
        "--regex",
        dest=dest,
        type=_regex,
        metavar="REGEX",
        help="text that this regular expression matches as a whole",
    )
    flags.add_argument(
        "--choice",
        dest=dest,
        action=_AppendChoice,
        type=_choice,
        metavar="TEXT",
        help="this text, or another one if repeated",
    )
    flags.add_argument(
        "--grammar",
        dest=dest,
        type=_grammar,
        metavar="FILE",
        help="text of this context-free grammar (Lark or GBNF)",
    )


class _AppendChoice(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        fields = getattr(namespace, self.dest) or {"choice": []}
        setattr(namespace, self.dest, {"choice": [*fields["choice"], values]})


def _schema(text: str) -> dict[str, Any]:
    return _checked(json=text if text.lstrip().startswith("{") else _read(text))


def _regex(text: str) -> dict[str, Any]:
    return _checked(regex=text)


def _choice(text: str) -> str:
    _checked(choice=[text])
    return text


def _grammar(path: str) -> dict[str, Any]:
    return _checked(grammar=_read(path))


def _checked(**fields: Any) -> dict[str, Any]:
    """The fields, which `argparse` is to refuse by their own message if they are wrong."""
    try:
        StructuredOutputsParams(**fields)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return fields


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise argparse.ArgumentTypeError(f"cannot read {path}: it is no UTF-8 text") from error
