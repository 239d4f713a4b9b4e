"""Chat templates: a conversation to prompt text, rendered in a sandbox.

A template comes with a checkpoint and is not trusted: it sees plain data, cannot change it, and
cannot reach Python through attributes.
"""

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

# Stands where a final message that is to be continued ends, to cut the template's ending off.
_CUT = "<jpaged-continue-here>"


def render_chat_template(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool,
    continue_final_message: bool,
    tools: Sequence[Mapping[str, Any]] | None,
    variables: Mapping[str, Any],
) -> str:
    """Returns the prompt text; see `Tokenizer.apply_chat_template`.

    Raises:
        ValueError: no messages, options that exclude each other, or a template that fails.
    """
    if not messages:
        raise ValueError("messages must hold at least one message, got none")
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(f"messages must be objects with a 'role', got {message!r}")
    shown = [dict(message) for message in messages]
    final = shown[-1].get("content")
    if continue_final_message:
        if add_generation_prompt:
            raise ValueError(
                "continue_final_message and add_generation_prompt must not both be true"
            )
        if not isinstance(final, str):
            raise ValueError("continue_final_message needs text as the last message's content")
        shown[-1]["content"] = final.rstrip() + _CUT
    try:
        text = _compile(template).render(
            messages=shown,
            tools=tools,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **variables,
        )
    except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
        raise ValueError(f"chat_template cannot render these messages: {error}") from error
    if continue_final_message:
        if _CUT not in text:
            raise ValueError(f"chat_template does not show the last message, got {final!r}")
        text = text[: text.rindex(_CUT)]
    return text


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}` marks for training what the assistant said; here it is only text."""

    tags = {"generation"}  # noqa: RUF012 (Jinja declares it so)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@functools.lru_cache(maxsize=16)
def _compile(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _GenerationBlock]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    try:
        return environment.from_string(template)
    except jinja2.TemplateError as error:
        raise ValueError(f"chat_template is not a valid template: {error}") from error


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML, which no model was trained on. Parameters, their order
    # included, are those of transformers, which templates are written for.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().astimezone().strftime(form)
