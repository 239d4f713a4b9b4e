"""From the messages of a request to prompt text."""

import json
from collections.abc import Sequence
from typing import Any

from jpaged.serving.errors import bad_request
from jpaged.serving.prompt_reader import off_loop
from jpaged.serving.protocol_chat import Message, TemplateOptions, Tool
from jpaged.serving.service import Service
from jpaged.serving.settings import ServerSettings

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
    options: TemplateOptions,
    tools: Sequence[Tool] | None,
) -> str:
    """The text of a conversation, as the model was trained on it.

    Args:
        service: For tokenizer and settings.
        messages: The conversation.
        options: What the request says about its template.
        tools: Those that the template shows.

    Raises:
        ApiError: Something is not allowed here.
        ValueError: The template cannot show these messages.
    """
    _check(options, service.settings)
    plain = [as_plain(message, f"messages[{i}]") for i, message in enumerate(messages)]
    shown = [tool.model_dump(exclude_none=True) for tool in tools] if tools else None
    goes_on = bool(options.continue_final_message)
    opens = options.add_generation_prompt
    tokenizer = service.reader.tokenizer

    def render() -> str:
        return tokenizer.apply_chat_template(
            plain,
            add_generation_prompt=not goes_on if opens is None else opens,
            continue_final_message=goes_on,
            tools=shown,
            chat_template=options.chat_template or service.settings.chat_template,
            **(options.chat_template_kwargs or {}),
        )

    return await off_loop(sum(len(message["content"]) for message in plain), render)


def _check(options: TemplateOptions, settings: ServerSettings) -> None:
    if options.chat_template is not None and not settings.trust_request_chat_template:
        raise bad_request(
            "chat_template is not supported: the server was started without "
            "--trust-request-chat-template",
            "chat_template",
            "unsupported_field",
        )
    for name in options.chat_template_kwargs or ():
        if name in _TAKEN_NAMES or not name.isidentifier():
            raise bad_request(
                f"chat_template_kwargs cannot set {name[:40]!r}", "chat_template_kwargs"
            )


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
