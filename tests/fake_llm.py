"""An engine that answers without a model, and what tests of the commands share."""

import json
import os
import signal
import types

from jpaged import cli
from jpaged.compile_plan import ProgramState, StepProgram, StepShape
from jpaged.outputs import CompletionOutput, Logprob, RequestOutput
from jpaged.sampling_params import RequestOutputKind


class FakeTokenizer:
    chat_template: str | None = "{{ messages }}"


class FakeLLM:
    """Answers every prompt with the same pieces, and keeps what it was asked."""

    pieces = ("Hello", " wörld", "!")

    def __init__(self, options):
        self.options = options
        self.requests = []
        self.num_streams_closed_early = 0
        self.is_shut_down = False
        self.tokenizer = FakeTokenizer()
        self.on_piece = lambda: None
        shapes = [StepShape(1, 1, True), StepShape(128, 8, False)]
        self.compile_plan = types.SimpleNamespace(
            programs=[StepProgram(s.name, str, shape=s) for s in shapes]
        )
        if options.get("compilation") == "eager":
            for program in self.compile_plan.programs:
                program.state, program.compile_time_s = ProgramState.READY, 1.5

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.is_shut_down = True

    def get_tokenizer(self):
        return self.tokenizer

    def chat_prompt(self, messages):
        text = "".join(f"<{m['role']}>{m['content']}" for m in messages)
        return {"prompt": text, "prompt_token_ids": list(text.encode())}

    def validate_request(self, prompt, params):
        if "too long" in str(prompt.get("prompt")):
            raise ValueError("prompt must be at most 8 tokens, got 9")

    def stream(self, prompt, params):
        kind = RequestOutputKind.FINAL_ONLY if params.use_beam_search else RequestOutputKind.DELTA
        assert params.output_kind is kind
        self.requests.append((prompt, params))
        finished = False
        try:
            for i, piece in enumerate(self.pieces):
                finished = i == len(self.pieces) - 1
                parts = [
                    CompletionOutput(j, piece, [i], finish_reason="stop" if finished else None)
                    for j in range(params.n)
                ]
                yield RequestOutput("0", None, [1, 2, 3], parts, finished)
                self.on_piece()
        finally:
            self.num_streams_closed_early += not finished

    def generate(self, prompts, sampling_params, *, use_tqdm, priority):
        self.requests += zip(prompts, sampling_params, strict=True)
        self.priority = priority
        text = "".join(self.pieces)
        logprobs = [{7: Logprob(-0.5, 1, "x")}]
        return [
            RequestOutput(
                str(i),
                None,
                [1, 2, 3],
                [
                    CompletionOutput(j, text, [7, 8], None, logprobs, "length")
                    for j in range(params.n)
                ],
                True,
            )
            for i, params in enumerate(sampling_params)
        ]


def press_ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)


def rows_of(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def run_file(tmp_path, name, content, *flags) -> tuple[int, list[dict]]:
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    output = tmp_path / "out.jsonl"
    code = cli.main(["generate", "--prompts-file", str(file), "-o", str(output), *flags])
    return code, rows_of(output.read_text(encoding="utf-8"))
