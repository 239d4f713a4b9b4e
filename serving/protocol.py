"""Request bodies of the API: every field that exists, with its type; anything else is refused.

Ranges are not repeated here: `SamplingParams` and the engine check them. An explicit null is the
same as a field left out, as OpenAI's clients send both.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, WithJsonSchema

MAX_NAME_CHARS = 128
# Each one is looked for at every token, while all other requests wait.
MAX_STOPS = 64
MAX_STOP_TOKENS = 256
MAX_BAD_WORDS = 256

Integer = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
"""What can travel to the engine; JSON knows larger ones."""


class Body(BaseModel):
    """What all bodies have in common: no conversions between types, no unknown fields."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


def _check_prompt(prompt: Any) -> Any:
    if isinstance(prompt, str):
        return prompt
    if not isinstance(prompt, list):
        raise ValueError("must be a string, a list of token ids, or a list of these")
    if not prompt:
        raise ValueError("must not be an empty list")
    kinds = {type(part) for part in prompt}
    if kinds in ({str}, {int}):
        return prompt
    if kinds == {list} and all(ids and {type(i) for i in ids} == {int} for ids in prompt):
        return prompt
    raise ValueError("must hold only strings, only token ids, or only non-empty lists of token ids")


_TOKEN_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
PromptField = Annotated[
    str | list[str] | list[int] | list[list[int]],
    PlainValidator(_check_prompt),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}, "minItems": 1},
                _TOKEN_IDS,
                {"type": "array", "items": _TOKEN_IDS, "minItems": 1},
            ],
            "title": "Prompt",
        }
    ),
]


class StreamOptions(Body):
    """What a stream tells besides its text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class JsonSchemaFormat(Body):
    """A JSON schema that the answer must follow."""

    name: str
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """OpenAI's way to ask for JSON."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputs(Body):
    """vLLM's way to ask for structure: exactly one of the first five."""

    json_: str | dict[str, Any] | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool | None = None
    whitespace_pattern: str | None = None


RequestName = Annotated[str, Field(min_length=1, max_length=MAX_NAME_CHARS)]


class GenerationBody(Body):
    """What completions and chat have in common."""

    model: str | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    max_tokens: Integer | None = None
    n: Integer | None = None
    presence_penalty: float | None = None
    seed: Integer | None = None
    stop: str | Annotated[list[str], Field(max_length=MAX_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    user: str | None = None
    response_format: ResponseFormat | None = None
    # From here on vLLM's own.
    use_beam_search: bool | None = None
    best_of: Integer | None = None
    length_penalty: float | None = None
    early_stopping: bool | Literal["never"] | None = None
    top_k: Integer | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop_token_ids: Annotated[list[Integer], Field(max_length=MAX_STOP_TOKENS)] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: Integer | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    truncate_prompt_tokens: Integer | None = None
    truncation_side: Literal["left", "right"] | None = None
    allowed_token_ids: list[Integer] | None = None
    prompt_logprobs: Integer | None = None
    bad_words: Annotated[list[str], Field(max_length=MAX_BAD_WORDS)] | None = None
    add_special_tokens: bool | None = None
    structured_outputs: StructuredOutputs | None = None
    priority: Integer | None = None
    request_id: RequestName | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    cache_salt: str | None = None
    stream_interval: Integer | None = None


class CompletionRequest(GenerationBody):
    """Body of POST /v1/completions."""

    prompt: PromptField
    echo: bool | None = None
    logprobs: Integer | None = None


REFUSED = {
    "suffix": "the models here only continue a text",
    "functions": "use tools",
    "function_call": "use tool_choice",
    "documents": "put them into messages, or into chat_template_kwargs",
    "guided_json": "use structured_outputs.json",
    "guided_regex": "use structured_outputs.regex",
    "guided_choice": "use structured_outputs.choice",
    "guided_grammar": "use structured_outputs.grammar",
    "guided_decoding_backend": "there is one backend, llguidance",
    "guided_whitespace_pattern": "use structured_outputs.whitespace_pattern",
    "structural_tag": "use structured_outputs.grammar",
    "logits_processors": "use logit_bias, bad_words or structured_outputs",
    "mm_processor_kwargs": "the models here take text only",
    "modalities": "the models here take text only",
    "audio": "the models here take text only",
    "store": "nothing is stored",
    "metadata": "nothing is stored",
    "reasoning_effort": "set what the template knows in chat_template_kwargs",
    "include_reasoning": "reasoning is part of the text here",
    "return_tokens_as_ids": "use return_tokens_as_token_ids",
    "lora_request": "there is no LoRA here",
}
"""Fields that clients of other servers may send, and what to do instead."""
