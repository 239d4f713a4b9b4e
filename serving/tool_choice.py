"""What `tools` and `tool_choice` mean for one request.

That is what the template shows, what the text must be, and how calls are read out of it.
"""

import dataclasses
import secrets
import string
from collections.abc import Callable, Sequence
from typing import Any

from jpaged.serving.errors import bad_request
from jpaged.serving.forced_calls import CallListStream, NamedCallStream
from jpaged.serving.protocol_chat import ChatCompletionRequest, NamedToolChoice, Tool
from jpaged.serving.sampling import Structure
from jpaged.serving.settings import ServerSettings
from jpaged.serving.tool_parsers import (
    ToolStream,
    forced_call,
    get_tool_parser,
    needs_special_tokens,
)
from jpaged.tokenizer import Tokenizer

# With these what is declared may stand elsewhere.
_COMBINED = {"anyOf", "oneOf", "allOf", "$ref", "if", "patternProperties", "dependentSchemas"}
_ALPHANUMERIC = string.ascii_letters + string.digits


@dataclasses.dataclass(frozen=True, slots=True)
class ToolPlan:
    """How a request uses tools.

    Attributes:
        tools: What the template shows.
        structure: What the text must be, if calls are forced.
        stream: Makes a reader of the calls in an answer; None if there can be none.
        calls_end_answer: Whether an answer with calls ends with "tool_calls" (OpenAI: not where
            the function was named).
        only_one: Whether calls after the first are dropped.
        keep_special_tokens: Whether the reader needs them.
        call_id: Makes the id of a call.
    """

    tools: Sequence[Tool] | None = None
    structure: Structure | None = None
    stream: Callable[[], ToolStream] | None = None
    calls_end_answer: bool = True
    only_one: bool = False
    keep_special_tokens: bool = False
    call_id: Callable[[], str] = lambda: f"call_{secrets.token_hex(12)}"


def plan_tools(
    body: ChatCompletionRequest, settings: ServerSettings, tokenizer: Tokenizer | None
) -> ToolPlan:
    """The plan of a request.

    Calls are forced in the form of the server's parser, which the model knows best; as plain JSON
    if it has none.

    Raises:
        ApiError: The choice does not fit the tools, or the server has no parser.
    """
    if not body.tools:
        if body.tool_choice not in (None, "none"):
            raise bad_request("tool_choice needs tools", "tool_choice")
        if body.parallel_tool_calls is not None:
            raise bad_request("parallel_tool_calls needs tools", "parallel_tool_calls")
        return ToolPlan()
    names = [tool.function.name for tool in body.tools]
    if len(set(names)) < len(names):
        raise bad_request("tools must have different names", "tools")
    if body.tool_choice == "none":
        return ToolPlan()  # what is not shown cannot be called
    for name in ("structured_outputs", "response_format"):
        given = getattr(body, name)
        if given is not None and getattr(given, "type", None) != "text":
            raise bad_request(f'{name} needs tool_choice="none" where there are tools', name)
    match body.tool_choice:
        case None | "auto":
            return _automatic(body, body.tools, settings)
        case NamedToolChoice() as choice:
            name = choice.function.name
            if name not in names:
                raise bad_request(
                    f"tool_choice must name one of tools, got {name[:64]!r}", "tool_choice"
                )
        case _:
            name = None
    if settings.tool_call_parser is not None:
        return _in_own_form(body, body.tools, name, settings, tokenizer)
    if name is not None:
        return _named(name, body.tools)
    return _required(body, body.tools)


def _in_own_form(
    body: ChatCompletionRequest,
    tools: Sequence[Tool],
    name: str | None,
    settings: ServerSettings,
    tokenizer: Tokenizer | None,
) -> ToolPlan:
    """Forces calls, of one function if `name` is given, in the form that the parser reads."""
    parser = settings.tool_call_parser
    assert parser is not None, "checked by the caller"
    only_one = name is not None or body.parallel_tool_calls is False
    plain = [
        {
            "type": "function",
            "function": {
                "name": tool.function.name,
                "parameters": _parameters(tool.function.parameters),
            },
        }
        for tool in tools
    ]
    form = forced_call(parser, plain, tokenizer, function=name, parallel=not only_one)
    return ToolPlan(
        tools=tools,
        structure={"grammar": form.grammar},
        stream=get_tool_parser(parser).stream,
        calls_end_answer=name is None,
        only_one=only_one,
        keep_special_tokens=needs_special_tokens(parser),
        call_id=_make_id(settings),
    )


def _required(body: ChatCompletionRequest, tools: Sequence[Tool]) -> ToolPlan:
    only_one = body.parallel_tool_calls is False
    return ToolPlan(
        tools=tools,
        structure={"json": _call_list(tools, only_one), "disable_any_whitespace": True},
        stream=CallListStream,
        only_one=only_one,
    )


def _named(name: str, tools: Sequence[Tool]) -> ToolPlan:
    (tool,) = [tool for tool in tools if tool.function.name == name]
    schema = _parameters(tool.function.parameters)
    return ToolPlan(
        tools=tools,
        structure={"json": schema, "disable_any_whitespace": True},
        stream=lambda: NamedCallStream(name),
        calls_end_answer=False,
    )


def _automatic(
    body: ChatCompletionRequest, tools: Sequence[Tool], settings: ServerSettings
) -> ToolPlan:
    name = settings.tool_call_parser
    if not settings.enable_auto_tool_choice or name is None:
        raise bad_request(
            'tool_choice="auto" needs a server started with --enable-auto-tool-choice and '
            '--tool-call-parser; "required", "none" and a named function work without',
            "tool_choice",
        )
    if any(tool.function.strict for tool in tools):
        raise bad_request('strict=true needs tool_choice="required" or a named function', "tools")
    return ToolPlan(
        tools=tools,
        stream=get_tool_parser(name).stream,
        only_one=body.parallel_tool_calls is False,
        keep_special_tokens=needs_special_tokens(name),
        call_id=_make_id(settings),
    )


def _make_id(settings: ServerSettings) -> Callable[[], str]:
    if settings.tool_call_parser == "mistral":
        # Mistral's templates refuse others when the call comes back in the next request.
        return lambda: "".join(secrets.choice(_ALPHANUMERIC) for _ in range(9))
    return lambda: f"call_{secrets.token_hex(12)}"


def _parameters(schema: dict[str, Any] | None) -> dict[str, Any]:
    """The schema of a function's arguments: an object."""
    if not schema:
        return {"type": "object", "properties": {}}
    if schema.get("type", "object") != "object":
        raise bad_request('tools must have parameters of type "object"', "tools")
    if _COMBINED.isdisjoint(schema):
        # A function takes what it declares; a model that may add more goes on and on.
        schema = {"additionalProperties": False, **schema}
    return {**schema, "type": "object"}


def _call_list(tools: Sequence[Tool], only_one: bool) -> dict[str, Any]:
    """The schema of a list of calls, with the name of each before its arguments."""
    # Definitions of one tool's schema are found from the root of the whole.
    definitions: dict[str, Any] = {}
    kinds = []
    for tool in tools:
        parameters = dict(_parameters(tool.function.parameters))
        for key, value in parameters.pop("$defs", {}).items():
            if definitions.setdefault(key, value) != value:
                raise bad_request(f"tools must agree on $defs, and {key[:40]!r} differs", "tools")
        kinds.append(
            {
                "type": "object",
                "properties": {
                    "name": {"type": "string", "enum": [tool.function.name]},
                    "arguments": parameters,
                },
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    schema: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"anyOf": kinds}}
    if only_one:
        schema["maxItems"] = 1
    if definitions:
        schema["$defs"] = definitions
    return schema
