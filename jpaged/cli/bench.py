"""`jpaged bench serve`: load for a running server; `jpaged.bench` does the work."""

import argparse
import asyncio
import datetime
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from jpaged.bench import arrivals, datasets, metrics, report, traces
from jpaged.bench.requests import BenchRequest, MadeUpPrompts
from jpaged.cli import bench_options
from jpaged.cli.streaming import write_text

if TYPE_CHECKING:
    from jpaged.bench.answers import Answer
    from jpaged.bench.client import Client

DEFAULT_ENDPOINT = "/v1/completions"


def run(args: argparse.Namespace) -> int:
    """Runs the command and returns its exit code."""
    bench_options.check(args)
    percentiles = bench_options.percentiles(args.metric_percentiles)
    shown = bench_options.metric_names(args.percentile_metrics)
    goodput = bench_options.goodput(args.goodput or ())
    client = _client(args)
    settings = _settings(args)
    output = _result_path(args)
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        model, answers, duration_s = runner.run(_benchmark(args, client))
    summary = metrics.summarize(answers, duration_s, percentiles=percentiles, goodput=goodput)
    write_text(report.table(summary, shown))
    for line in report.error_lines(answers):
        print(f"jpaged: failed: {line}", file=sys.stderr)
    if output is not None:
        result = settings | {"model_id": model} | report.result_dict(summary)
        if args.save_detailed:
            result |= report.details(answers)
        _write_result(output, result)
    return 1 if summary.failed else 0


def _client(args: argparse.Namespace) -> "Client":
    try:
        from jpaged.bench import client
    except ImportError as error:
        raise ImportError('jpaged bench needs: pip install "jpaged[serve]"') from error
    endpoint = args.endpoint
    if args.backend == "openai-chat" and endpoint == DEFAULT_ENDPOINT:
        endpoint = client.CHAT_ENDPOINT
    return client.Client(
        args.base_url or bench_options.url(args.host, args.port),
        endpoint,
        api_key=args.api_key or os.environ.get("OPENAI_API_KEY"),
        headers=bench_options.pairs("header", args.header),
        fields=bench_options.fields(args),
        verify_tls=not args.insecure,
    )


async def _benchmark(
    args: argparse.Namespace, client: "Client"
) -> tuple[str, list["Answer"], float]:
    from jpaged.bench import serve

    async with client:
        model, max_model_len = args.model, None
        if model is None or args.ready_check_timeout_sec or args.dataset_name == "trace":
            models = await serve.wait_until_ready(client, args.ready_check_timeout_sec)
            if not models:
                raise ValueError("--model must be given: the server names none")
            model = model or models[0]["id"]
            max_model_len = models[0].get("max_model_len")
        rng = np.random.default_rng(args.seed)
        requests = await _requests(args, client, model, rng)
        if args.dataset_name == "trace" and max_model_len is not None:
            requests = _that_fit(requests, max_model_len)
        times_s = _times(args, requests, rng)
        for request in requests:
            client.body(request, model)  # a prompt of the wrong kind shows before any is sent
        if args.num_warmups:
            await _warm_up(args, client, model, requests[0])
        with tqdm(total=len(requests), unit="req", disable=args.disable_tqdm or None) as progress:
            answers, duration_s = await serve.run_requests(
                client,
                model,
                requests,
                times_s,
                max_concurrency=args.max_concurrency,
                on_answer=lambda answer: progress.update(),
            )
    return model, answers, duration_s


async def _requests(args, client: "Client", model: str, rng) -> list[BenchRequest]:
    prompts = MadeUpPrompts(
        args.seed, as_token_ids=args.prompt_token_ids, vocab_size=args.vocab_size
    )
    match args.dataset_name:
        case "random":
            return datasets.random_requests(
                args.num_prompts,
                prompts,
                rng,
                input_len=args.random_input_len,
                output_len=args.random_output_len,
                range_ratio=args.random_range_ratio,
                prefix_len=args.random_prefix_len,
            )
        case "custom":
            return datasets.custom_requests(
                args.dataset_path, args.num_prompts, args.custom_output_len
            )
        case "sharegpt":

            async def count_tokens(texts: list[str]) -> list[int]:
                if args.tokenizer is None:
                    return await client.count_tokens(model, texts)
                from jpaged.tokenizer import load_tokenizer

                tokenizer = load_tokenizer(args.tokenizer)
                return [len(tokenizer.encode(text, add_special_tokens=False)) for text in texts]

            return await datasets.sharegpt_requests(
                args.dataset_path, args.num_prompts, rng, count_tokens, args.sharegpt_output_len
            )
        case _:
            return traces.trace_requests(args.dataset_path, args.num_prompts, prompts)


def _that_fit(requests: list[BenchRequest], max_model_len: int) -> list[BenchRequest]:
    """Those of a trace that the model has room for; tells how many are left out."""
    fit = [r for r in requests if (r.prompt_tokens or 0) + r.max_tokens <= max_model_len]
    if len(fit) < len(requests):
        print(
            f"jpaged: {len(requests) - len(fit)} of {len(requests)} requests of the trace are "
            f"longer than the model's {max_model_len} tokens and left out",
            file=sys.stderr,
        )
    if not fit:
        raise ValueError(f"dataset_path has no request of at most {max_model_len} tokens")
    return fit


def _times(args, requests: Sequence[BenchRequest], rng) -> np.ndarray:
    recorded = [r.arrival_s for r in requests if r.arrival_s is not None]
    if len(recorded) == len(requests):
        return arrivals.trace_times(recorded, args.request_rate)
    if args.ramp_up_strategy is not None:
        return arrivals.ramp_up_times(
            len(requests),
            args.ramp_up_strategy,
            args.ramp_up_start_rps,
            args.ramp_up_end_rps,
            args.burstiness,
            rng,
        )
    return arrivals.arrival_times(len(requests), args.request_rate, args.burstiness, rng)


async def _warm_up(args, client: "Client", model: str, request: BenchRequest) -> None:
    from jpaged.bench import serve

    answers, _ = await serve.run_requests(
        client,
        model,
        [request] * args.num_warmups,
        [0.0] * args.num_warmups,
        max_concurrency=args.max_concurrency,
    )
    if errors := report.error_lines(answers):
        raise RuntimeError(f"warm-up failed: {errors[0]}")


def _loop_factory() -> Any:
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """What the run was asked to do; infinity is written as text, JSON has none."""
    rate = args.request_rate
    settings: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S"),
        "backend": args.backend,
        "dataset_name": args.dataset_name,
        "num_prompts": args.num_prompts,
        "request_rate": "inf" if math.isinf(rate) else rate,
        "burstiness": args.burstiness,
        "max_concurrency": args.max_concurrency,
        "seed": args.seed,
    }
    if args.ramp_up_strategy is not None:
        settings["ramp_up_strategy"] = args.ramp_up_strategy
        settings["ramp_up_start_rps"] = args.ramp_up_start_rps
        settings["ramp_up_end_rps"] = args.ramp_up_end_rps
    return settings | bench_options.pairs("metadata", args.metadata)


def _result_path(args: argparse.Namespace) -> Path | None:
    """Where the result goes; a path that cannot be written is refused before any work."""
    if args.save_result is None:
        if args.save_detailed or args.result_filename or args.result_dir:
            raise ValueError(
                "--save-detailed, --result-dir and --result-filename need --save-result"
            )
        return None
    now = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S")
    name = (
        args.save_result
        or args.result_filename
        or f"{args.backend}-{args.request_rate}qps-{now}.json"
    )
    path = Path(args.result_dir or ".", name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
    except OSError as error:
        raise ValueError(f"cannot write --save-result {path}: {error.strerror}") from error
    return path


def _write_result(path: Path, result: dict[str, Any]) -> None:
    path.write_text(json.dumps(result) + "\n", encoding="utf-8")
    print(f"jpaged: result in {path}", file=sys.stderr)
