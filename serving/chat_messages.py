"""From the messages of a request to prompt text."""

import json
from collections.abc import Sequence
from typing import Any

from jpaged.serving.errors import bad_request
from jpaged.serving.prompt_reader import off_loop
from jpaged.serving.protocol_chat import Message, Tool
from jpaged.serving.service import Service

# What `apply_chat_template` gives a template itself; special tokens are the model's.
_TAKEN_NAMES = {
    "messages",
    "tools",
    "documents",
    "chat_template",
    "add_generation_prompt",
    "continue_final_message",
    "bos_token",
    "eos_token",
}


async def read_messages(
    service: Service,
    messages: Sequence[Message],
    *,
    tools: Sequence[Tool] | None,
    chat_template: str | None,
    chat_template_kwargs: dict[str, Any] | None,
    add_generation_prompt: bool | None,
    continue_final_message: bool | None,
) -> str:
    """The text of a conversation, as the model was trained on it.

    Args:
        service: For tokenizer and settings.
        messages: The conversation.
        tools: What the template shows of tools.
        chat_template: The request's own template.
        chat_template_kwargs: Further names that the template may use.
        add_generation_prompt: Whether the assistant's turn is opened; by default it is, unless
            the last message goes on.
        continue_final_message: Whether the last message goes on.

    Raises:
        ApiError: Something is not allowed here.
        ValueError: The template cannot show these messages.
    """
    if chat_template is not None and not service.settings.trust_request_chat_template:
        raise bad_request(
            "chat_template is not supported: the server was started without "
            "--trust-request-chat-template",
            "chat_template",
            "unsupported_field",
        )
    for name in chat_template_kwargs or ():
        if name in _TAKEN_NAMES or not name.isidentifier():
            raise bad_request(
                f"chat_template_kwargs cannot set {name[:40]!r}", "chat_template_kwargs"
            )
    plain = [as_plain(message, f"messages[{i}]") for i, message in enumerate(messages)]
    num_chars = sum(len(message["content"]) for message in plain)
    tokenizer = service.reader.tokenizer
    go_on = bool(continue_final_message)

    def render() -> str:
        return tokenizer.apply_chat_template(
            plain,
            add_generation_prompt=not go_on
            if add_generation_prompt is None
            else (add_generation_prompt),
            continue_final_message=go_on,
            tools=[tool.model_dump(exclude_none=True) for tool in tools] if tools else None,
            chat_template=chat_template or service.settings.chat_template,
            **(chat_template_kwargs or {}),
        )

    return await off_loop(num_chars, render)


def as_plain(message: Message, where: str) -> dict[str, Any]:
    """A message as templates know it: text as one string, arguments of calls as objects."""
    content = message.content
    if not isinstance(content, str):
        content = "\n".join(part.text for part in content or ())
    # Templates were trained with "system", which OpenAI renamed for newer models of its own.
    role = "system" if message.role == "developer" else message.role
    plain: dict[str, Any] = {"role": role, "content": content}
    if message.name is not None:
        plain["name"] = message.name
    if message.tool_call_id is not None:
        plain["tool_call_id"] = message.tool_call_id
    if message.tool_calls is not None:
        plain["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {
                    "name": call.function.name,
                    "arguments": _arguments(call.function.arguments, f"{where}.tool_calls[{i}]"),
                },
            }
            for i, call in enumerate(message.tool_calls)
        ]
    return plain


def _arguments(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text) if text.strip() else {}
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        field = f"{where}.function.arguments"
        raise bad_request(f"{field} must be a JSON object as text", field)
    return value
