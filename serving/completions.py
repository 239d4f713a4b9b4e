"""POST /v1/completions: prompts as they are, continued."""

import contextlib
import dataclasses
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from msgspec import UNSET
from starlette.requests import Request
from starlette.responses import Response

from jpaged.outputs import CompletionOutput, RequestOutput
from jpaged.serving.answers import Completion, CompletionChoice, CompletionLogprobs
from jpaged.serving.errors import bad_request
from jpaged.serving.generation import Generation, Job
from jpaged.serving.logprobs import completion_logprobs, prompt_logprobs
from jpaged.serving.protocol import CompletionRequest
from jpaged.serving.request_body import read_body
from jpaged.serving.responses import json_response, stream_response, usage_of, usage_wishes
from jpaged.serving.sampling import sampling_params, structure_of
from jpaged.serving.service import Service, fairness_key
from jpaged.serving.streaming import DONE, ChunkWriter, while_connected

DEFAULT_MAX_TOKENS = 16
"""OpenAI's default of this route."""


@dataclasses.dataclass(slots=True)
class _Run:
    """One request, checked and ready to run.

    Attributes:
        body: What was asked.
        answer_id: Of the answer.
        model: Its name in the answer.
        texts: Of each prompt, as `echo` shows it.
        generation: Runs it.
        n: Continuations of each prompt.
        keeps_output: Whether more than the prompt is shown.
    """

    body: CompletionRequest
    answer_id: str
    model: str
    texts: list[str]
    generation: Generation
    n: int
    keeps_output: bool


class Completions:
    """The route's handler."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def create(self, request: Request) -> Response:
        """Continues one or more prompts."""
        service = self._service
        body = await read_body(request, CompletionRequest, service.settings)
        run = await self._prepare(request, body)
        if body.stream:
            return stream_response(service, self._events(run))
        results = await while_connected(request.receive, run.generation.collect())
        return json_response(self._answer(run, results))

    async def _prepare(self, request: Request, body: CompletionRequest) -> _Run:
        service = self._service
        model = service.model_name(body.model)
        keeps_output = not (body.echo and body.max_tokens == 0)
        params = sampling_params(
            body,
            service.settings,
            service.engine.info,
            structured=structure_of(body),
            max_tokens=_max_tokens(body) if keeps_output else 1,
            logprobs=body.logprobs,
            prompt_logprobs=_prompt_logprobs(body),
        )
        prompts = await self._read_prompts(body, params.num_seqs)
        jobs = [
            Job(
                service.reader.prompt(
                    text, ids, body, max_tokens=params.max_tokens, field="prompt"
                ),
                params,
            )
            for text, ids in prompts
        ]
        texts = []
        if body.echo:
            tokenizer = service.reader.tokenizer
            texts = [
                tokenizer.decode(job.token_ids, skip_special_tokens=False)
                if text is None or body.truncate_prompt_tokens is not None
                else text
                for (text, _), job in zip(prompts, jobs, strict=True)
            ]
        answer_id = service.answer_id(request, "cmpl", body.request_id)
        generation = Generation(
            service,
            answer_id,
            jobs,
            priority=body.priority or 0,
            fairness_key=fairness_key(request),
        )
        return _Run(body, answer_id, model, texts, generation, params.n, keeps_output)

    async def _read_prompts(
        self, body: CompletionRequest, num_seqs: int
    ) -> list[tuple[str | None, Sequence[int]]]:
        given: Any = body.prompt
        prompts = given if isinstance(given, list) and not isinstance(given[0], int) else [given]
        limit = self._service.settings.max_prompts
        if len(prompts) * num_seqs > limit:
            raise bad_request(
                f"prompt must be at most {limit // num_seqs} prompts here with n={num_seqs}, got "
                f"{len(prompts)}",
                "prompt",
            )
        special = body.add_special_tokens is not False
        read = self._service.reader.encode
        return [
            (prompt, await read(prompt, add_special_tokens=special, field="prompt"))
            if isinstance(prompt, str)
            else (None, prompt)
            for prompt in prompts
        ]

    def _answer(self, run: _Run, results: Sequence[RequestOutput]) -> Completion:
        choices = []
        for place, result in enumerate(results):
            for part in result.outputs:
                choice = self._choice(run, place, result, part, _Told(), run.body.echo)
                if run.body.prompt_logprobs is not None:
                    choice.prompt_logprobs = prompt_logprobs(result.prompt_logprobs or ())
                choices.append(choice)
        num_tokens = sum(len(part.token_ids) for r in results for part in r.outputs)
        usage = usage_of(
            sum(len(result.prompt_token_ids) for result in results),
            num_tokens if run.keeps_output else 0,
            sum(result.num_cached_tokens for result in results),
        )
        return Completion(
            id=run.answer_id,
            created=int(time.time()),
            model=run.model,
            choices=choices,
            usage=usage,
            system_fingerprint=self._service.fingerprint,
        )

    async def _events(self, run: _Run) -> AsyncGenerator[bytes, None]:
        body, service = run.body, self._service
        with_usage, each_usage = usage_wishes(body, service.settings)
        head = service.head(run.answer_id, "text_completion", run.model)
        writer = ChunkWriter(head, with_usage=with_usage)
        # Then a token without text of its own says nothing.
        is_silent = body.logprobs is None and not body.return_token_ids
        told: dict[int, _Told] = {}
        num_cached = [0] * len(run.generation.jobs)
        stream = run.generation.stream(body.stream_interval or 1)
        async with contextlib.aclosing(stream):
            async for place, output in stream:
                num_cached[place] = output.num_cached_tokens
                chunks = []
                for part in output.outputs:
                    index = place * run.n + part.index
                    state = told.get(index)
                    with_prompt = body.echo and state is None
                    if state is None:
                        state = told[index] = _Told()
                    choice = self._choice(run, place, output, part, state, with_prompt)
                    state.num_tokens += len(part.token_ids) if run.keeps_output else 0
                    if is_silent and not choice.text and choice.finish_reason is None:
                        continue
                    usage = None
                    if each_usage:
                        num_prompt = len(output.prompt_token_ids)
                        usage = usage_of(num_prompt, state.num_tokens, num_cached[place])
                    chunks.append(writer.chunk(choice, usage))
                if chunks:
                    yield b"".join(chunks)
        if with_usage:
            num_prompt = sum(len(job.token_ids) for job in run.generation.jobs)
            num_tokens = sum(state.num_tokens for state in told.values())
            yield writer.last(usage_of(num_prompt, num_tokens, sum(num_cached)))
        yield DONE

    def _choice(
        self,
        run: _Run,
        place: int,
        output: RequestOutput,
        part: CompletionOutput,
        told: "_Told",
        with_prompt: bool | None,
    ) -> CompletionChoice:
        """What is new of a continuation, after its prompt if `with_prompt`."""
        body = run.body
        text, token_ids, positions = part.text, part.token_ids, part.logprobs
        finish_reason: Any = part.finish_reason
        if not run.keeps_output:
            text, token_ids, positions, finish_reason = "", [], [], "length"
        logprobs = None
        if body.logprobs is not None:
            shown_ids, shown = token_ids, list(positions or ())
            if with_prompt:
                shown_ids = [*output.prompt_token_ids, *token_ids]
                shown = [*(output.prompt_logprobs or ()), *shown]
            logprobs = self._logprobs(body, shown_ids, shown, told)
        choice = CompletionChoice(
            place * run.n + part.index,
            run.texts[place] + text if with_prompt else text,
            logprobs,
            finish_reason,
            part.stop_reason,
        )
        if body.return_token_ids:
            choice.token_ids = token_ids
            is_first = told.num_tokens == 0
            choice.prompt_token_ids = output.prompt_token_ids if is_first else UNSET
        return choice

    def _logprobs(
        self, body: CompletionRequest, token_ids: Sequence[int], positions: Any, told: "_Told"
    ) -> CompletionLogprobs:
        as_token_ids = body.return_tokens_as_token_ids
        if as_token_ids is None:
            as_token_ids = self._service.settings.return_tokens_as_token_ids
        found = completion_logprobs(
            token_ids,
            positions,
            offset=told.offset,
            as_token_ids=as_token_ids,
            tokenizer=self._service.engine.tokenizer,
        )
        if found.tokens:
            told.offset = found.text_offset[-1] + len(found.tokens[-1])
        return found


@dataclasses.dataclass(slots=True)
class _Told:
    """What a stream has already told of one choice."""

    num_tokens: int = 0
    offset: int = 0


def _prompt_logprobs(body: CompletionRequest) -> int | None:
    """How many most likely tokens of each place of the prompt are needed."""
    if not body.echo or body.logprobs is None:
        return body.prompt_logprobs
    if body.prompt_logprobs not in (None, body.logprobs):
        raise bad_request(
            f"prompt_logprobs must be equal to logprobs={body.logprobs} with echo=true, got "
            f"{body.prompt_logprobs}",
            "prompt_logprobs",
        )
    return body.logprobs


def _max_tokens(body: CompletionRequest) -> int:
    return DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
