"""Prompts of the command line: from text or a line of a file to what the engine takes.

Here a text is a user's message wherever the model has a chat template; to the engine it is always
plain completion.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PROMPT_FIELDS = ("prompt", "messages", "prompt_token_ids")

Message = Mapping[str, Any]


def has_chat_template(llm: Any) -> bool:
    """Whether the model came with a chat template."""
    return llm.get_tokenizer().chat_template is not None


def from_messages(llm: Any, messages: Sequence[Message]) -> dict[str, Any]:
    """The engine's prompt for a conversation that the model is to continue.

    Raises:
        ValueError: The messages do not form one, or the model has no chat template.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"messages must be a non-empty list of objects, got {messages!r}")
    if not has_chat_template(llm):
        raise ValueError("messages need a chat template, and the model has none")
    return llm.chat_prompt(messages)


def from_text(llm: Any, text: str, *, raw: bool, system: str | None) -> dict[str, Any]:
    """The engine's prompt for a text: a user's message if the model has a chat template.

    Raises:
        ValueError: The text is empty, or a system message cannot be placed.
    """
    if not isinstance(text, str) or not text:
        raise ValueError(f"prompt must be a non-empty string, got {text!r}")
    if system is not None and (raw or not has_chat_template(llm)):
        why = "--raw goes without one" if raw else "the model has none"
        raise ValueError(f"--system needs a chat template, and {why}")
    if raw or not has_chat_template(llm):
        return {"prompt": text}
    opening = [{"role": "system", "content": system}] if system is not None else []
    return from_messages(llm, [*opening, {"role": "user", "content": text}])


def from_row(llm: Any, row: Mapping[str, Any], *, raw: bool, system: str | None) -> dict[str, Any]:
    """The engine's prompt for one line of a prompts file.

    Raises:
        ValueError: The row does not hold exactly one usable prompt.
    """
    given = [name for name in PROMPT_FIELDS if name in row]
    if len(given) != 1:
        raise ValueError(
            f"one of {', '.join(PROMPT_FIELDS)} must be given, got {', '.join(given) or 'none'}"
        )
    salt = {"cache_salt": row["cache_salt"]} if "cache_salt" in row else {}
    if "prompt" in row:
        return from_text(llm, row["prompt"], raw=raw, system=system) | salt
    if "messages" in row:
        messages = row["messages"]
        if system is not None and isinstance(messages, list):
            messages = [{"role": "system", "content": system}, *messages]
        return from_messages(llm, messages) | salt
    token_ids = row["prompt_token_ids"]
    is_list = isinstance(token_ids, list) and token_ids
    if not is_list or not all(type(token) is int for token in token_ids):
        raise ValueError(
            f"prompt_token_ids must be a non-empty list of integers, got {token_ids!r}"
        )
    return {"prompt_token_ids": token_ids} | salt


def read_rows(file: str) -> list[dict[str, Any] | ValueError]:
    """The rows of a prompts file in order; what is wrong with a line stands in its place.

    Raises:
        ValueError: There is no prompt in it.
        OSError: It cannot be read.
    """
    data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    lines = [line for line in data.removeprefix(b"\xef\xbb\xbf").splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"--prompts-file must hold at least one prompt, got none in {file}")
    if file == "-":
        is_json = lines[0].lstrip().startswith(b"{")
    else:
        is_json = Path(file).suffix in (".jsonl", ".ndjson")
    return [_parse_line(line, is_json=is_json) for line in lines]


def _parse_line(line: bytes, *, is_json: bool) -> dict[str, Any] | ValueError:
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        return ValueError(f"the line is not UTF-8: {error.reason} at byte {error.start}")
    if not is_json:
        return {"prompt": text}
    try:
        row = json.loads(text)
    except ValueError as error:
        return ValueError(f"the line is not JSON: {error}")
    if not isinstance(row, dict):
        return ValueError(f"the line must hold a JSON object, got {text.strip()[:40]!r}")
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return ValueError("the line is not Unicode text: it escapes a lone surrogate")
    return row
