"""From the fields of a request to `SamplingParams`."""

from typing import Any

from jpaged.sampling_params import RequestOutputKind, SamplingParams
from jpaged.serving.engine import EngineInfo
from jpaged.serving.errors import bad_request
from jpaged.serving.protocol import GenerationBody, ResponseFormat, StructuredOutputs
from jpaged.serving.settings import ServerSettings

Structure = dict[str, Any]
"""Fields of `StructuredOutputsParams`."""

_SAME_NAME = (
    "n",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "min_tokens",
    "prompt_logprobs",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "include_stop_str_in_output",
    "allowed_token_ids",
    "bad_words",
    "use_beam_search",
    "length_penalty",
    "early_stopping",
)
_MAX_LOGIT_BIASES = 1024
"""OpenAI allows 300; each one costs the step a little."""


def sampling_params(
    body: GenerationBody,
    settings: ServerSettings,
    info: EngineInfo,
    *,
    structured: Structure | None,
    **own: Any,
) -> SamplingParams:
    """The sampling parameters of a request.

    Args:
        body: Its fields; null leaves one at its default, or the model's.
        settings: For the limits of the server.
        info: For those of model and engine.
        structured: What the text must follow, if anything.
        **own: What the route sets itself.

    Raises:
        ApiError: A field is not allowed here.
        ValueError: A value is out of range.
    """
    check_stream(body)
    given = {name: getattr(body, name) for name in _SAME_NAME}
    options = {} if body.use_beam_search else dict[str, Any](info.default_sampling)
    options |= {name: value for name, value in given.items() if value is not None}
    options |= {"logit_bias": _logit_bias(body.logit_bias), "structured_outputs": structured} | own
    num = options.get("n", 1)
    if body.use_beam_search:
        options.setdefault("temperature", 0.0)
        options["best_of"] = body.best_of
    elif body.best_of is not None and body.best_of != num:
        raise bad_request(f"best_of must be n={num} without use_beam_search", "best_of")
    if max(num, body.best_of or 1) > settings.max_n:
        field = "best_of" if num <= settings.max_n else "n"
        raise bad_request(f"{field} must be at most {settings.max_n} here", field)
    kind = RequestOutputKind.DELTA if body.stream else RequestOutputKind.FINAL_ONLY
    params = SamplingParams(**options, output_kind=kind)
    # The engine does it too; here nothing has been sent to it yet.
    params.validate(
        vocab_size=info.vocab_size,
        max_logprobs=info.max_logprobs,
        max_num_seqs=info.max_num_seqs,
        eos_token_ids=info.eos_token_ids,
    )
    return params


def check_stream(body: GenerationBody) -> None:
    """Refuses what needs a stream, or what cannot be one.

    Raises:
        ApiError: names the field.
    """
    if not body.stream:
        for name in ("stream_options", "stream_interval"):
            if getattr(body, name) is not None:
                raise bad_request(f"{name} needs stream=true", name)
        return
    if body.use_beam_search:
        raise bad_request(
            "use_beam_search needs stream=false: beams may be dropped again", "stream"
        )
    if body.prompt_logprobs is not None:
        raise bad_request("prompt_logprobs needs stream=false", "prompt_logprobs")
    if body.stream_interval is not None and body.stream_interval < 1:
        raise bad_request(
            f"stream_interval must be at least 1, got {body.stream_interval}", "stream_interval"
        )


def structure_of(body: GenerationBody) -> Structure | None:
    """What `response_format` or `structured_outputs` asks for.

    Raises:
        ApiError: They contradict.
        ValueError: The schema, expression or grammar is out of range.
    """
    formatted = None if body.response_format is None else _of_format(body.response_format)
    if body.structured_outputs is None:
        return formatted
    if formatted is not None:
        raise bad_request(
            "structured_outputs and response_format exclude each other, got both",
            "structured_outputs",
        )
    return _of_structured(body.structured_outputs)


def _of_format(form: ResponseFormat) -> Structure | None:
    if form.type != "json_schema":
        if form.json_schema is not None:
            raise bad_request(
                'response_format.json_schema needs type="json_schema"',
                "response_format.json_schema",
            )
        return {"json_object": True} if form.type == "json_object" else None
    if form.json_schema is None or form.json_schema.schema_ is None:
        raise bad_request(
            "response_format.json_schema.schema is required", "response_format.json_schema"
        )
    return {"json": form.json_schema.schema_}


def _of_structured(given: StructuredOutputs) -> Structure:
    values = {
        "json": given.json_,
        "regex": given.regex,
        "choice": given.choice,
        "grammar": given.grammar,
        "json_object": given.json_object or None,
        "disable_any_whitespace": given.disable_any_whitespace,
        "whitespace_pattern": given.whitespace_pattern,
    }
    return {name: value for name, value in values.items() if value is not None}


def _logit_bias(bias: dict[str, float] | None) -> dict[int, float] | None:
    if bias is None:
        return None
    if len(bias) > _MAX_LOGIT_BIASES:
        raise bad_request(
            f"logit_bias must hold at most {_MAX_LOGIT_BIASES} tokens, got {len(bias)}",
            "logit_bias",
        )
    for token in bias:
        if not token.isascii() or not token.isdigit() or len(token) > 18:
            raise bad_request(
                f"logit_bias must have token ids as keys, got {token[:40]!r}", "logit_bias"
            )
    return {int(token): value for token, value in bias.items()}
