"""The grammar that makes a model call a function, in the form that its parser reads."""

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jpaged.serving.tool_parsers import hermes, mistral
from jpaged.structured_outputs_params import StructuredOutputsParams, lark_string

if TYPE_CHECKING:
    from jpaged.tokenizer import Tokenizer

_NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}


def forced_call(
    parser: str,
    tools: Sequence[Mapping[str, Any]],
    tokenizer: "Tokenizer | None" = None,
    *,
    function: str | None = None,
    parallel: bool = True,
) -> StructuredOutputsParams:
    """The form of an answer that calls functions and says nothing else.

    Args:
        parser: Name of the parser that is to read it.
        tools: Descriptions in OpenAI's form, `{"type": "function", "function": {…}}`.
        tokenizer: The model's; tells which markers are tokens.
        function: The one function to call; None for any of the tools.
        parallel: Whether several calls may follow each other.

    Raises:
        ValueError: There are no tools, none of that name, or one has no name or no schema; or the
            parser is not known.
    """
    functions = [_checked(tool) for tool in tools]
    if function is not None:
        functions = [found for found in functions if found[0] == function]
        if not functions:
            raise ValueError(f"tool_choice must name one of the tools, got {function!r}")
    if not functions:
        raise ValueError("tools must hold at least 1 function to call, got none")
    calls = _calls(parser, functions, _Markers(tokenizer))
    rules = [f"args_{i}: %json {json.dumps(schema)}" for i, (_, schema) in enumerate(functions)]
    separator = calls.separator and f"{calls.separator} "
    repeated = f" ({separator}call)*" if parallel else ""
    return StructuredOutputsParams(
        grammar="\n".join(
            [
                f"start: {calls.before} call{repeated} {calls.behind}",
                f"call: {' | '.join(calls.alternatives)}",
                *rules,
                "",
            ]
        )
    )


class _Markers:
    """Texts as a grammar spells them: those that are a token by its id."""

    def __init__(self, tokenizer: "Tokenizer | None") -> None:
        self._tokenizer = tokenizer

    def has(self, marker: str) -> bool:
        return self._tokenizer is not None and self._tokenizer.token_to_id(marker) is not None

    def spell(self, marker: str) -> str:
        if self._tokenizer is not None:
            token_id = self._tokenizer.token_to_id(marker)
            if token_id is not None:
                return f"<[{token_id}]>"
        return lark_string(marker)


class _Calls:
    """How calls are written: each of the alternatives, and what stands around them."""

    def __init__(
        self, alternatives: list[str], *, before: str = "", separator: str = "", behind: str = ""
    ) -> None:
        self.alternatives = alternatives
        self.before = before
        self.separator = separator
        self.behind = behind


def _calls(parser: str, functions: list[tuple[str, Any]], markers: _Markers) -> _Calls:
    names = [name for name, _ in functions]
    match parser:
        case "hermes":
            start, end = markers.spell(hermes.START), markers.spell(hermes.END)
            newline = lark_string("\n")
            return _Calls(
                [f"{start} {newline} {o} {newline} {end}" for o in _objects(names, "arguments")],
                separator=newline,
            )
        case "llama3_json":
            return _Calls(_objects(names, "parameters"), separator=lark_string("; "))
        case "mistral" if markers.has(mistral.ARGS):
            start, middle = markers.spell(mistral.START), markers.spell(mistral.ARGS)
            return _Calls(
                [f"{start} {lark_string(name)} {middle} args_{i}" for i, name in enumerate(names)]
            )
        case "mistral":
            return _Calls(
                _objects(names, "arguments"),
                before=f"{markers.spell(mistral.START)} {lark_string(' [')}",
                separator=lark_string(", "),
                behind=lark_string("]"),
            )
    raise ValueError(f"tool_choice cannot force a call with tool_call_parser {parser!r}")


def _objects(names: list[str], key: str) -> list[str]:
    starts = [lark_string(f'{{"name": {json.dumps(name)}, "{key}": ') for name in names]
    return [f"{start} args_{i} {lark_string('}')}" for i, start in enumerate(starts)]


def _checked(tool: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Name and schema of a tool's function."""
    function = tool.get("function") if isinstance(tool, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(name, str) or not name:
        raise ValueError(f"tools must hold functions with a name, got {tool!r}")
    schema = function.get("parameters")
    if schema is None:
        schema = _NO_PARAMETERS
    if not isinstance(schema, Mapping):
        raise ValueError(f"parameters of {name!r} must be a JSON schema, got {schema!r}")
    # Keywords that are not supported are refused, whatever the schema itself asks for.
    return name, {**schema, "type": "object", "x-guidance": {"lenient": False}}
