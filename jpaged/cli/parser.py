"""The arguments of every command, with the help a person reads.

An option left out stays None, so that the defaults of `SamplingParams` and `EngineConfig` hold; a
test compares those with the defaults that the help texts name.
"""

import argparse
import re
import shutil

import jpaged
from jpaged.cli import client_parser, plan_parser, serve_parser, structured

SAMPLING_PREFIX = "sampling_"
ENGINE_PREFIX = "engine_"

GENERATE_MAX_TOKENS = 256
CHAT_MAX_TOKENS = 512
CHAT_TEMPERATURE = 0.7

_GENERATE_EXAMPLES = """\
examples:
  jpaged generate "Write a haiku about rivers."
  jpaged generate --raw "Once upon a time" --temperature 0.8 --top-p 0.95
  jpaged generate -m ./my-checkpoint --system "Answer in French." "Who are you?"
  jpaged generate --prompts-file in.jsonl -o out.jsonl --temperature 0
  jpaged generate "Name a colour." --choice red --choice blue

a prompts file:
  *.jsonl   one object a line with "prompt", "messages" or "prompt_token_ids",
            and any sampling parameters of its own, by their Python names:
            {"prompt": "Hi", "max_tokens": 8}, or "structured_outputs":
            {"json": {...}} (or regex, choice, grammar). "id" is copied to the
            result;
            "priority" counts under --policy priority; only requests of the
            same "cache_salt" share their prefix cache.
  else      one prompt a line; blank lines are skipped
  -         standard input; objects if its first line starts with "{", else
            prompts

  Results are JSON lines in the order of the prompts. A line that cannot be
  run yields {"index": ..., "error": ...} and exit code 1; the others run all
  the same."""

_CHAT_EXAMPLES = """\
in the chat: /reset forgets the conversation, /help lists the commands, /exit
or Ctrl-D leaves, Ctrl-C cuts an answer short. Piped input works too:
  echo "Who are you?" | jpaged chat

With --url the answers come from a running server; options of the engine are
then its own and cannot be given. A sampling option that is left out is the
server's, except --max-tokens and --temperature."""


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        width = min(shutil.get_terminal_size().columns, 100) - 2
        super().__init__(prog, max_help_position=34, width=width)


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of the whole command line."""
    parser = _make_parser(
        argparse.ArgumentParser,
        prog="jpaged",
        description="LLM serving in JAX with a paged KV cache.",
        epilog="`jpaged COMMAND --help` explains a command.",
    )
    parser.add_argument("--version", action="version", version=f"jpaged {jpaged.__version__}")
    parser.set_defaults(debug=False)
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND")
    _add_generate(commands)
    _add_chat(commands)
    _add_compile(commands)
    _add_doctor(commands)
    _add_plan(commands)
    _add_serve(commands)
    _add_bench(commands)
    _add_run_batch(commands)
    return parser


def _make_parser(make, **options):
    return make(formatter_class=_HelpFormatter, allow_abbrev=False, **options)


def _add_command(
    commands, name: str, summary: str, *, arguments: str = "", epilog: str | None = None
) -> argparse.ArgumentParser:
    command = _make_parser(
        commands.add_parser,
        name=name,
        help=summary,
        description=f"{summary}.",
        usage=f"jpaged {name} [options]{arguments}",
        epilog=epilog,
    )
    command.add_argument("--debug", action="store_true", help="show the full traceback of an error")
    return command


def _add_generate(commands) -> None:
    command = _add_command(
        commands,
        "generate",
        "Generate text from one prompt, or from a file of them",
        arguments=" [PROMPT]",
        epilog=_GENERATE_EXAMPLES,
    )
    command.add_argument(
        "prompt", nargs="?", metavar="PROMPT", help="the prompt; read from standard input if piped"
    )
    _add_model(command)
    command.add_argument("--prompts-file", metavar="FILE", help="run every prompt of this file")
    command.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        help="write results as JSON lines (default: a single prompt's text is shown as it comes, "
        "a file's results go to standard output)",
    )
    command.add_argument(
        "--raw", action="store_true", help="continue the prompt as it is, without chat template"
    )
    command.add_argument("--system", metavar="TEXT", help="system message before the prompt")
    command.add_argument(
        "-q", "--quiet", action="store_true", help="no statistics and no progress bar"
    )
    command.add_argument(
        "--watch",
        action="store_true",
        help="show on standard error how blocks fill, are shared and copied; text comes at the end",
    )
    _add_sampling(command, max_tokens=GENERATE_MAX_TOKENS, temperature=1.0, with_n=True)
    structured.add_flags(command, f"{SAMPLING_PREFIX}structured_outputs")
    _add_engine(command)


def _add_chat(commands) -> None:
    command = _add_command(
        commands, "chat", "Talk with a model in the terminal", epilog=_CHAT_EXAMPLES
    )
    _add_model(command)
    command.add_argument("--system", metavar="TEXT", help="system message of the conversation")
    command.add_argument("--stats", action="store_true", help="statistics after each answer")
    client_parser.add_chat_arguments(command)
    _add_sampling(command, max_tokens=CHAT_MAX_TOKENS, temperature=CHAT_TEMPERATURE, with_n=False)
    _add_engine(command)


def _add_compile(commands) -> None:
    command = _add_command(
        commands,
        "compile",
        "Compile all programs of an engine with these options into the cache",
    )
    _add_model(command)
    command.add_argument(
        "--list", action="store_true", help="only list the programs and their padded sizes"
    )
    _add_engine(command, for_requests=False)


def _add_doctor(commands) -> None:
    command = _add_command(
        commands, "doctor", "Show versions, devices, caches, and what would be used and why"
    )
    command.add_argument("--json", action="store_true", help="print one JSON object")


def _add_plan(commands) -> None:
    command = _add_command(
        commands,
        "plan",
        "Say whether a model fits a TPU or GPU that is not here, and how fast it is",
        epilog=plan_parser.PLAN_EXAMPLES,
    )
    plan_parser.add_plan_arguments(command, ENGINE_PREFIX)


def _add_serve(commands) -> None:
    command = _add_command(
        commands,
        "serve",
        "Serve a model over HTTP, with OpenAI's API",
        arguments=" [MODEL]",
        epilog=serve_parser.SERVE_EXAMPLES,
    )
    command.add_argument("positional_model", nargs="?", metavar="MODEL", help="the same as --model")
    _add_model(command)
    serve_parser.add_serve_arguments(command)
    _add_engine(command, with_api=True)


def _add_bench(commands) -> None:
    # The name of the benchmark is a positional argument: `jpaged bench serve`.
    command = _add_command(
        commands,
        "bench",
        "Put load on a running server and measure how it answers",
        arguments=" serve",
        epilog=client_parser.BENCH_EXAMPLES,
    )
    command.add_argument("benchmark", choices=["serve"], help="what to measure: a server")
    client_parser.add_bench_arguments(command)


def _add_run_batch(commands) -> None:
    command = _add_command(
        commands,
        "run-batch",
        "Run a file of requests in OpenAI's batch format",
        arguments=" -i FILE -o FILE",
        epilog=client_parser.BATCH_EXAMPLES,
    )
    _add_model(command)
    client_parser.add_batch_arguments(command)
    _add_engine(command, with_api=True)


def _add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "-m",
        "--model",
        dest=f"{ENGINE_PREFIX}model",
        metavar="MODEL",
        help="a directory (Hugging Face safetensors), a .gguf file or a hub id "
        "(default: the embedded SmolLM2-135M-Instruct)",
    )


def _add_sampling(command, *, max_tokens: int, temperature: float, with_n: bool) -> None:
    group = command.add_argument_group("sampling")

    def add(flag: str, text: str, default: object = None, *, dest: str = "", **options) -> None:
        shown = "" if default is None else f" (default: {default})"
        name = dest or flag.removeprefix("--").replace("-", "_")
        group.add_argument(flag, dest=SAMPLING_PREFIX + name, help=text + shown, **options)

    add("--max-tokens", "most tokens to generate", max_tokens, type=int, metavar="N")
    add("--min-tokens", "no end or stop token before this many", 0, type=int, metavar="N")
    add(
        "--temperature",
        "0 always takes the most likely token",
        temperature,
        type=float,
        metavar="X",
    )
    add("--top-p", "keep the likeliest tokens up to this mass", 1.0, type=float, metavar="X")
    add("--top-k", "keep the K likeliest tokens; 0 keeps all", 0, type=int, metavar="K")
    add("--min-p", "drop tokens below X times the likeliest", 0.0, type=float, metavar="X")
    add(
        "--seed",
        "fixes the random draws (default: one drawn from --engine-seed)",
        type=int,
        metavar="N",
    )
    if with_n:
        add("--n", "continuations of each prompt", 1, type=int, metavar="N")
        add(
            "--logprobs",
            "also return the N likeliest tokens of each position; needs -o or --prompts-file",
            type=int,
            metavar="N",
        )
        _add_beam_search(add)
    add("--presence-penalty", "for tokens already generated", 0.0, type=float, metavar="X")
    add("--frequency-penalty", "the same for each time they were", 0.0, type=float, metavar="X")
    add("--repetition-penalty", "factor for tokens seen so far", 1.0, type=float, metavar="X")
    add("--stop", "end before this text; may be repeated", action="append", metavar="TEXT")
    add("--stop-token-ids", "end at these tokens", type=_token_ids, metavar="ID,ID,...")
    add("--bad-words", "never write this; may be repeated", action="append", metavar="TEXT")
    add("--ignore-eos", "go on after the model's end token", action="store_const", const=True)


def _add_beam_search(add) -> None:
    add(
        "--use-beam-search",
        "find the likeliest texts instead of sampling; shown when it is done",
        action="store_const",
        const=True,
    )
    add("--beam-width", "beams to follow (default: --n)", dest="best_of", type=int, metavar="K")
    add("--length-penalty", "above 0 favours long texts", 1.0, type=float, metavar="X")
    add(
        "--early-stopping",
        "once K texts are complete: True stops, False goes on while one may become better, never "
        "looks for it longer",
        False,
        type=_early_stopping,
        metavar="WHEN",
    )


def _add_engine(command, *, for_requests: bool = True, with_api: bool = False) -> None:
    group = command.add_argument_group("engine")

    def add(flag: str, text: str, default: object = None, *, dest: str = "", **options) -> None:
        shown = "" if default is None else f" (default: {default})"
        name = dest or flag.removeprefix("--").replace("-", "_")
        group.add_argument(flag, dest=ENGINE_PREFIX + name, help=text + shown, **options)

    if for_requests:
        add("--tokenizer", "take the tokenizer from here (default: the model)", metavar="PATH")
    add("--revision", "revision of a hub id", metavar="REV")
    if with_api:
        add(
            "--generation-config",
            "auto: sampling that requests leave open is what the model recommends; none: the API's",
            "auto",
            metavar="WHICH",
        )
    add("--load-format", "auto, or dummy for random weights", "auto", metavar="FORMAT")
    add(
        "--tensor-parallel-size",
        "devices that the model is cut over, those of all hosts together",
        1,
        type=int,
        metavar="N",
    )
    _add_hosts(add)
    add("--dtype", "auto, float32, bfloat16 or float16", "auto", metavar="DTYPE")
    add(
        "--max-model-len",
        "most tokens of a sequence (default: the model's limit)",
        type=int,
        metavar="N",
    )
    add(
        "--max-num-seqs",
        "most sequences at once (default: by device)",
        type=int,
        metavar="N",
    )
    add(
        "--max-num-batched-tokens",
        "most tokens of one step (default: by device)",
        type=int,
        metavar="N",
    )
    add("--block-size", "tokens of a KV block", 16, type=int, metavar="N")
    add("--kv-cache-dtype", "auto (as --dtype) or fp8", "auto", metavar="DTYPE")
    add("--num-blocks", "blocks of the pool, instead of by memory", type=int, metavar="N")
    add(
        "--kv-cache-memory-bytes",
        "size of the pool, as 512MiB or 2GiB, instead of by memory",
        type=_num_bytes,
        metavar="SIZE",
    )
    add(
        "--memory-utilization",
        "share of the accelerator's memory to use",
        0.9,
        type=float,
        metavar="X",
    )
    add(
        "--no-prefix-caching",
        "compute shared beginnings of prompts anew",
        dest="enable_prefix_caching",
        action="store_const",
        const=False,
    )
    add(
        "--preemption-mode",
        "recompute, swap (blocks move to the host) or auto (what is quicker)",
        "recompute",
        metavar="MODE",
    )
    add(
        "--swap-space",
        "GiB of host memory for swapped and cached blocks (default: up to 4 if it is needed)",
        type=float,
        metavar="GIB",
    )
    add(
        "--host-cache",
        "keep cached blocks that are evicted on the host",
        action="store_const",
        const=True,
    )
    add("--policy", "fcfs, or priority (lower first)", "fcfs", metavar="POLICY")
    add("--max-logprobs", "largest --logprobs that is allowed", 20, type=int, metavar="N")
    add("--engine-seed", "seed of requests without one", 0, dest="seed", type=int, metavar="N")
    if for_requests:
        add(
            "--compilation",
            "background, eager (all before the start) or lazy (default: lazy in chat and for a "
            "single prompt, else background)",
            metavar="WHEN",
        )


def _add_hosts(add) -> None:
    add(
        "--nnodes",
        "hosts that hold the model together, each running this command; on TPU VMs this is enough",
        1,
        type=int,
        metavar="N",
    )
    add("--node-rank", "which of the hosts this is; 0 leads and answers", type=int, metavar="R")
    add("--master-addr", "address of the host of rank 0", metavar="ADDRESS")
    add(
        "--master-port",
        "port of the host of rank 0 for the others; the next one is JAX's",
        29501,
        type=int,
        metavar="PORT",
    )


def _token_ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be integers separated by commas, got {text!r}"
        ) from None


def _early_stopping(text: str) -> bool | str:
    values = {"false": False, "true": True, "never": "never"}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"must be True, False or never, got {text!r}")
    return values[text.lower()]


_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


def _num_bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]i?|)b?", text.strip().lower())
    if match is None:
        raise argparse.ArgumentTypeError(f"must be like 2GiB, 512MiB or a number, got {text!r}")
    return int(float(match[1]) * _UNITS[match[2]])
