"""Request bodies of chat completions, and of the routes that only use the tokenizer."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from jpaged.serving.protocol import Body, GenerationBody, Integer


class TextPart(Body):
    """A piece of a message's text."""

    type: Literal["text"]
    text: str

    @model_validator(mode="before")
    @classmethod
    def _refuse_media(cls, part: Any) -> Any:
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind != "text":
            raise ValueError(f"of type {kind[:40]!r} is not supported: models here take text only")
        return part


class FunctionCall(Body):
    """A function and its arguments as JSON text."""

    name: str
    arguments: str


class MessageToolCall(Body):
    """A call that the assistant made earlier in the conversation."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Body):
    """One message of a conversation; what the template does not know it leaves out.

    The last four exist because clients send back the messages that they got.
    """

    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: Annotated[list[MessageToolCall], Field(min_length=1)] | None = None
    tool_call_id: str | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None

    @model_validator(mode="after")
    def _check_role(self) -> Self:
        if self.content is None and self.tool_calls is None:
            raise ValueError("needs content (or, of an assistant, tool_calls)")
        if self.tool_calls is not None and self.role in ("system", "developer", "user", "tool"):
            raise ValueError(f"of role {self.role!r} cannot have tool_calls")
        if (self.tool_call_id is not None) != (self.role == "tool"):
            raise ValueError('needs tool_call_id if its role is "tool", and only then')
        return self


ToolName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]


class FunctionDefinition(Body):
    """A function that the model may call."""

    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    """A tool that the model may use."""

    type: Literal["function"]
    function: FunctionDefinition


class FunctionName(Body):
    """The function of a `NamedToolChoice`."""

    name: str


class NamedToolChoice(Body):
    """Makes the model call this function."""

    type: Literal["function"]
    function: FunctionName


Messages = Annotated[list[Message], Field(min_length=1)]


class TemplateOptions(Body):
    """How a conversation becomes a prompt."""

    tools: Annotated[list[Tool], Field(min_length=1, max_length=1024)] | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None


class ChatCompletionRequest(GenerationBody, TemplateOptions):
    """Body of POST /v1/chat/completions."""

    messages: Messages
    logprobs: bool | None = None
    top_logprobs: Integer | None = None
    max_completion_tokens: Integer | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    parallel_tool_calls: bool | None = None


class TokenizeRequest(TemplateOptions):
    """Body of POST /tokenize: either a prompt or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Body):
    """Body of POST /detokenize."""

    model: str | None = None
    tokens: list[Integer]
