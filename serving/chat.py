"""POST /v1/chat/completions: conversations."""

import time

from starlette.requests import Request
from starlette.responses import Response

from jpaged.outputs import CompletionOutput, RequestOutput
from jpaged.serving.answers import (
    ChatChoice,
    ChatCompletion,
    ChatMessage,
    FunctionCall,
    ToolCall,
)
from jpaged.serving.chat_messages import read_messages
from jpaged.serving.chat_run import ChatRun
from jpaged.serving.chat_stream import ChatStream
from jpaged.serving.errors import bad_request
from jpaged.serving.generation import Generation, Job
from jpaged.serving.logprobs import prompt_logprobs
from jpaged.serving.protocol_chat import ChatCompletionRequest
from jpaged.serving.request_body import read_body
from jpaged.serving.responses import json_response, stream_response, usage_of
from jpaged.serving.sampling import sampling_params, structure_of
from jpaged.serving.service import Service, fairness_key
from jpaged.serving.streaming import while_connected
from jpaged.serving.tool_choice import plan_tools
from jpaged.serving.tool_parsers import collect


class Chat:
    """The route's handler."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def create(self, request: Request) -> Response:
        """Answers a conversation."""
        service = self._service
        body = await read_body(request, ChatCompletionRequest, service.settings)
        run = await self._prepare(request, body)
        if body.stream:
            return stream_response(service, ChatStream(service, run).events())
        (result,) = await while_connected(request.receive, run.generation.collect())
        return json_response(self._answer(run, result))

    async def _prepare(self, request: Request, body: ChatCompletionRequest) -> ChatRun:
        service = self._service
        model = service.model_name(body.model)
        plan = plan_tools(body, service.settings, service.engine.tokenizer)
        num_top = _num_top(body)
        own = {"skip_special_tokens": False} if plan.keep_special_tokens else {}
        params = sampling_params(
            body,
            service.settings,
            service.engine.info,
            structured=plan.structure or structure_of(body),
            logprobs=num_top,
            max_tokens=_max_tokens(body),  # without a limit it is the model's length
            **own,
        )
        text = await read_messages(service, body.messages, body, plan.tools)
        # The template has written the special tokens itself.
        special = bool(body.add_special_tokens)
        ids = await service.reader.encode(text, add_special_tokens=special, field="messages")
        answer_id = service.answer_id(request, "chatcmpl", body.request_id)
        prompt = service.reader.prompt(
            text, ids, body, max_tokens=params.max_tokens, field="messages"
        )
        as_token_ids = body.return_tokens_as_token_ids
        if as_token_ids is None:
            as_token_ids = service.settings.return_tokens_as_token_ids
        role = service.settings.response_role
        if body.continue_final_message:
            role = body.messages[-1].role
        generation = Generation(
            service,
            answer_id,
            [Job(prompt, params)],
            priority=body.priority or 0,
            fairness_key=fairness_key(request),
        )
        return ChatRun(body, answer_id, model, role, plan, num_top, as_token_ids, generation)

    def _answer(self, run: ChatRun, result: RequestOutput) -> ChatCompletion:
        num_tokens = sum(len(part.token_ids) for part in result.outputs)
        answer = ChatCompletion(
            id=run.answer_id,
            created=int(time.time()),
            model=run.model,
            choices=[_choice(run, part) for part in result.outputs],
            usage=usage_of(len(result.prompt_token_ids), num_tokens, result.num_cached_tokens),
            system_fingerprint=self._service.fingerprint,
        )
        if run.body.return_token_ids:
            answer.prompt_token_ids = result.prompt_token_ids
        if run.body.prompt_logprobs is not None:
            answer.prompt_logprobs = prompt_logprobs(result.prompt_logprobs or ())
        return answer


def _choice(run: ChatRun, part: CompletionOutput) -> ChatChoice:
    message, finish_reason = ChatMessage(run.role, part.text), part.finish_reason
    if run.plan.stream is not None:
        stream = run.plan.stream()
        parsed = collect([*stream.push(part.text), *stream.finish()])
        calls = parsed.tool_calls[:1] if run.plan.only_one else parsed.tool_calls
        if calls:
            message.content = parsed.content
            message.tool_calls = [
                ToolCall(run.plan.call_id(), FunctionCall(call.name, call.arguments))
                for call in calls
            ]
            if run.plan.calls_end_answer and finish_reason == "stop":
                finish_reason = "tool_calls"
    choice = ChatChoice(
        part.index,
        message,
        run.logprobs(part),
        finish_reason,  # pyright: ignore[reportArgumentType]
        part.stop_reason,
    )
    if run.body.return_token_ids:
        choice.token_ids = part.token_ids
    return choice


def _num_top(body: ChatCompletionRequest) -> int | None:
    if not body.logprobs:
        if body.top_logprobs:
            raise bad_request("top_logprobs needs logprobs=true", "top_logprobs")
        return None
    num = body.top_logprobs or 0
    if num < 0:
        raise bad_request(f"top_logprobs must be at least 0, got {num}", "top_logprobs")
    return num


def _max_tokens(body: ChatCompletionRequest) -> int | None:
    given = [n for n in (body.max_completion_tokens, body.max_tokens) if n is not None]
    if len(set(given)) > 1:
        raise bad_request(
            "max_tokens and max_completion_tokens are the same here, got two values", "max_tokens"
        )
    return given[0] if given else None
