"""`jpaged generate` for one prompt; a file of prompts goes on to `jpaged.cli.batch`."""

import argparse
import sys
import time

from jpaged.cli import batch, engine, prompts
from jpaged.cli.parser import GENERATE_MAX_TOKENS
from jpaged.cli.streaming import (
    check_watch,
    ctrl_c_interrupts,
    stream,
    watching,
    write_text,
)


def run(args: argparse.Namespace) -> int:
    """Runs the command and returns its exit code."""
    options = engine.sampling_options(args, max_tokens=GENERATE_MAX_TOKENS)
    # What is wrong with the options shows before a model is loaded.
    params = engine.sampling_params(options, delta=True)
    check_watch(args)
    if args.prompts_file is not None:
        if args.prompt is not None:
            raise ValueError("give either PROMPT or --prompts-file, got both")
        rows = prompts.read_rows(args.prompts_file)
        return batch.run(args, rows, options)
    text = _read_prompt(args)
    if args.output is not None:
        return batch.run(args, [{"prompt": text}], options)
    if params.logprobs is not None:
        raise ValueError("--logprobs needs -o FILE, where they are written")
    return _run_single(args, text, params)


def _run_single(args: argparse.Namespace, text: str, params) -> int:
    start = time.perf_counter()
    with engine.make_llm(engine.LONE_REQUEST | engine.engine_options(args)) as llm:
        prompt = prompts.from_text(llm, text, raw=args.raw, system=args.system)
        llm.validate_request(prompt, params)
        ready_s = time.perf_counter() - start
        on_text = (lambda text: None) if args.watch else write_text
        with ctrl_c_interrupts() as interrupted, watching(args, llm):
            streamed = stream(llm, prompt, params, on_text=on_text, interrupted=interrupted)
            was_interrupted = interrupted()
        if args.watch and params.n == 1:
            write_text(streamed.texts[0])
        if params.n > 1:
            for i, answer in enumerate(streamed.texts, 1):
                write_text(f"--- {i} of {params.n}\n{answer}\n")
        else:
            write_text("\n")
        if not args.quiet:
            print(f"jpaged: ready in {ready_s:.1f} s, {streamed.summary()}", file=sys.stderr)
    return 130 if was_interrupted else 0


def _read_prompt(args: argparse.Namespace) -> str:
    if args.prompt is not None:
        text = args.prompt
    elif sys.stdin is not None and not sys.stdin.isatty():
        text = sys.stdin.read().removesuffix("\n")
    else:
        raise ValueError("a PROMPT or --prompts-file must be given, got none")
    if not text:
        raise ValueError("prompt must not be empty, got ''")
    return text
