"""The arguments of the commands that talk to a server or do its work offline."""

import argparse
import math

from jpaged.cli.serve_parser import SERVER_PREFIX

BENCH_EXAMPLES = """\
examples:
  jpaged bench serve --request-rate 4 --num-prompts 200
  jpaged bench serve --endpoint /v1/chat/completions --max-concurrency 32
  jpaged bench serve --dataset-name trace --dataset-path azure.csv.gz \\
      --request-rate 2 --goodput ttft:500 tpot:50 --save-result result.json

datasets:
  random    made-up text: frequent English words, each of which is one token
  custom    JSON lines with "prompt" or "messages", and maybe "output_tokens"
  sharegpt  a JSON list of conversations; the first exchange of each
  trace     CSV or JSON lines (may be gzipped) with the tokens of prompt and
            answer and maybe the time of arrival (arrival_s or timestamp) and
            hash_ids of shared blocks; text is made up. --request-rate
            stretches the times; requests that the model has no room for are
            left out

  Prompts longer than told are cut by nobody: what the server counts is what
  the result shows. Exit code 1 if a request failed."""

BATCH_EXAMPLES = """\
an input line:
  {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions",
   "body": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8}}
its output line, as soon as it is finished, so in another order:
  {"id": "batch_req_...", "custom_id": "a", "response": {"status_code": 200,
   "request_id": "...", "body": {...}}, "error": null}

A line that cannot be run yields {"response": null, "error": {...}}; the others
run all the same, and the exit code is 1. After a crash run the same command
again: it keeps what the output file has and runs the rest. To run all anew,
remove the output file."""


def add_chat_arguments(command: argparse.ArgumentParser) -> None:
    """The arguments of `jpaged chat` that are about a server."""
    group = command.add_argument_group("server")
    group.add_argument(
        "--url",
        metavar="URL",
        help="talk to a server with OpenAI's API there, as http://localhost:8000",
    )
    group.add_argument(
        "--api-key", metavar="KEY", help="key of that server (default: $OPENAI_API_KEY)"
    )
    group.add_argument(
        "--model-name", metavar="NAME", help="model to ask for (default: the server's first)"
    )


def add_batch_arguments(command: argparse.ArgumentParser) -> None:
    """The arguments of `jpaged run-batch`; the engine's are added by the caller."""
    add = command.add_argument
    add(
        "-i",
        "--input-file",
        required=True,
        metavar="FILE",
        help="requests as JSON lines in OpenAI's batch format; - is standard input",
    )
    add(
        "-o",
        "--output-file",
        required=True,
        metavar="FILE",
        help="results as JSON lines; - is standard output",
    )
    _add_batch_api(command)


def _add_batch_api(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("API")
    group.add_argument(
        "--served-model-name",
        dest=SERVER_PREFIX + "served_model_names",
        nargs="+",
        metavar="NAME",
        help="what requests may call the model (default: the model's name)",
    )
    group.add_argument(
        "--chat-template",
        dest=SERVER_PREFIX + "chat_template",
        metavar="FILE",
        help="a template instead of the model's own",
    )
    group.add_argument(
        "--enable-auto-tool-choice",
        dest=SERVER_PREFIX + "enable_auto_tool_choice",
        action="store_const",
        const=True,
        help="the model may choose to call tools",
    )
    group.add_argument(
        "--tool-call-parser",
        dest=SERVER_PREFIX + "tool_call_parser",
        metavar="NAME",
        help="format in which the model writes calls",
    )


def add_bench_arguments(command: argparse.ArgumentParser) -> None:
    """The arguments of `jpaged bench serve`."""
    _add_server(command)
    _add_dataset(command)
    _add_load(command)
    _add_request_fields(command)
    _add_result(command)


def _add_server(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("server")
    add = group.add_argument
    add(
        "--backend",
        choices=["openai", "openai-chat"],
        default="openai",
        help="openai-chat is --endpoint /v1/chat/completions (default: openai)",
    )
    add("--base-url", metavar="URL", help="as https://example.org (default: of host and port)")
    add("--host", default="127.0.0.1", help="(default: 127.0.0.1)")
    add("--port", type=int, default=8000, metavar="N", help="(default: 8000)")
    add(
        "--endpoint",
        default="/v1/completions",
        metavar="PATH",
        help="/v1/completions or /v1/chat/completions (default: /v1/completions)",
    )
    add("-m", "--model", metavar="NAME", help="model to ask for (default: the server's first)")
    add("--api-key", metavar="KEY", help="bearer token (default: $OPENAI_API_KEY)")
    add("--header", nargs="+", metavar="NAME=VALUE", help="further headers")
    add("--insecure", action="store_true", help="do not check the server's TLS certificate")
    add(
        "--ready-check-timeout-sec",
        type=float,
        default=0,
        metavar="S",
        help="wait this long for a server that is still starting (default: 0)",
    )


def _add_dataset(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("dataset")
    add = group.add_argument
    add(
        "--dataset-name",
        choices=["random", "custom", "sharegpt", "trace"],
        default="random",
        help="where requests come from, see below (default: random)",
    )
    add("--dataset-path", metavar="FILE", help="file of the other datasets than random")
    add("--num-prompts", type=int, default=1000, metavar="N", help="requests (default: 1000)")
    _add_random(add)
    add("--custom-output-len", type=int, default=256, metavar="N", help="(default: 256)")
    add(
        "--sharegpt-output-len",
        type=int,
        metavar="N",
        help="instead of the length of the recorded answer",
    )
    add(
        "--tokenizer",
        metavar="MODEL",
        help="counts tokens of ShareGPT (default: the server's /tokenize)",
    )
    add("--seed", type=int, default=0, metavar="N", help="of everything drawn (default: 0)")


def _add_random(add) -> None:
    add("--random-input-len", type=int, default=1024, metavar="N", help="(default: 1024)")
    add("--random-output-len", type=int, default=128, metavar="N", help="(default: 128)")
    add(
        "--random-range-ratio",
        type=float,
        default=0.0,
        metavar="X",
        help="lengths vary by this share up and down (default: 0.0)",
    )
    add(
        "--random-prefix-len",
        type=int,
        default=0,
        metavar="N",
        help="tokens before that, the same in all prompts (default: 0)",
    )
    add(
        "--prompt-token-ids",
        action="store_true",
        help="made-up prompts are token ids instead of text",
    )
    add(
        "--vocab-size",
        type=int,
        default=30_000,
        metavar="N",
        help="those ids are below it (default: 30000)",
    )


def _add_load(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("load")
    add = group.add_argument
    add(
        "--request-rate",
        type=float,
        default=math.inf,
        metavar="X",
        help="requests a second; inf sends all at once (default: inf)",
    )
    add(
        "--burstiness",
        type=float,
        default=1.0,
        metavar="X",
        help="shape of the gamma distribution of gaps: 1 is Poisson, below comes in bursts, above "
        "is steadier (default: 1.0)",
    )
    add("--max-concurrency", type=int, metavar="N", help="most open requests (default: no limit)")
    add(
        "--ramp-up-strategy",
        choices=["linear", "exponential"],
        help="let the rate go from start to end over the requests",
    )
    add("--ramp-up-start-rps", type=float, metavar="X", help="rate at the start")
    add("--ramp-up-end-rps", type=float, metavar="X", help="rate at the end")
    add(
        "--num-warmups",
        type=int,
        default=0,
        metavar="N",
        help="requests before, which do not count (default: 0)",
    )


def _add_request_fields(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("requests")
    add = group.add_argument
    add("--ignore-eos", action="store_true", help="answers have the full length asked for")
    add("--temperature", type=float, metavar="X", help="(default: the server's)")
    add("--top-p", type=float, metavar="X", help="(default: the server's)")
    add("--top-k", type=int, metavar="K", help="(default: the server's)")
    add("--min-p", type=float, metavar="X", help="(default: the server's)")
    add("--logprobs", type=int, metavar="N", help="ask for log-probabilities")
    add("--extra-body", metavar="JSON", help="an object with further fields of every request")


def _add_result(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("result")
    add = group.add_argument
    add(
        "--percentile-metrics",
        default="ttft,tpot,itl,e2el",
        metavar="LIST",
        help="what the table shows (default: ttft,tpot,itl,e2el)",
    )
    add("--metric-percentiles", default="99", metavar="LIST", help="as 50,90,99 (default: 99)")
    add(
        "--goodput",
        nargs="+",
        metavar="METRIC:MS",
        help="count requests that meet all of these: ttft, tpot, e2el",
    )
    add(
        "--save-result",
        nargs="?",
        const="",
        metavar="FILE",
        help="write JSON there; without FILE, a name of backend, rate and time",
    )
    add("--save-detailed", action="store_true", help="with the numbers of every request")
    add("--result-dir", metavar="DIR", help="folder of the result (default: this one)")
    add("--result-filename", metavar="FILE", help="another way to name the result")
    add("--metadata", nargs="+", metavar="NAME=VALUE", help="written into the result")
    add("--disable-tqdm", action="store_true", help="no progress bar")
