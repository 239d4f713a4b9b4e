"""Makes beam_search.json beside it with transformers' beam search in float32.

Run it in an environment with torch: `python tests/golden/make_beam_golden.py`. Three kinds of
models: tables of logits by last token, where the search itself must agree to the last bit; the
tiny models; and the default model.
"""

import itertools
import platform
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import transformers
from transformers.modeling_outputs import CausalLMOutput

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1] / "benchmarks")]

from make_golden import tiny_oracle, write  # noqa: E402
from tiny_models import CASES, PROMPT  # noqa: E402
from transformers_oracle import load_default_model  # noqa: E402

from jpaged.tokenizer import load_tokenizer  # noqa: E402

BEAM_WIDTHS = (2, 4, 6)
LENGTH_PENALTIES = (0.0, 0.5, 1.0, 2.0)
EARLY_STOPPING = (False, True, "never")
TINY_MODELS = ("llama_gqa_llama3", "qwen2", "mistral_window", "qwen3")
QUESTIONS = (
    "What is the capital of France? Answer in one sentence.",
    "Write a short story about a lighthouse keeper.",
)
# Added to each logit in a second run: whoever sums in another order must come to the same result.
NOISE = 3e-4


def main() -> None:
    meta = {
        "made_by": "tests/golden/make_beam_golden.py",
        "oracle": f"transformers {transformers.__version__}, torch {torch.__version__}, float32",
        "python": platform.python_version(),
        "numpy": np.__version__,
        "noise": f"results of models are the same with {NOISE} times a normal draw on every logit",
    }
    value = {
        "meta": meta,
        "tables": make_tables(),
        "tiny_models": make_tiny(),
        "default_model": make_default(),
    }
    write("beam_search.json", value)


class TableConfig(transformers.PretrainedConfig):
    model_type = "table"

    def __init__(self, vocab_size: int = 0, **options: Any) -> None:
        super().__init__(**options)
        self.vocab_size = vocab_size
        self.num_hidden_layers = 1


class TableModel(transformers.PreTrainedModel, transformers.GenerationMixin):
    """Logits that depend on the last token only."""

    config_class = TableConfig

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__(TableConfig(len(table)))
        self.table = torch.nn.Parameter(table)

    def forward(self, input_ids: torch.Tensor, attention_mask: Any = None, **_: Any) -> Any:
        logits = self.table[input_ids]
        return CausalLMOutput(logits=logits)

    def prepare_inputs_for_generation(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, input_ids: torch.Tensor, **kwargs: Any
    ) -> Any:
        return {"input_ids": input_ids}


class Noise(transformers.LogitsProcessor):
    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        draws = torch.randn(scores.shape, generator=self.generator)
        return scores + NOISE * draws


@torch.no_grad()
def search(model: Any, prompt: list[int], case: dict[str, Any], noise: bool = False) -> Any:
    """Returns the hypotheses, best first: token ids with the end token, and their scores."""
    ends = case["end_token_ids"]
    config = transformers.GenerationConfig(
        do_sample=False,
        num_beams=case["beam_width"],
        num_return_sequences=case["beam_width"],
        max_new_tokens=case["max_tokens"],
        length_penalty=case["length_penalty"],
        early_stopping=case["early_stopping"],
        eos_token_id=ends or None,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
        use_cache=not isinstance(model, TableModel),
    )
    # What a model's own config says must not count.
    model.generation_config = transformers.GenerationConfig(pad_token_id=0)
    ids = torch.tensor([prompt])
    found = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        generation_config=config,
        logits_processor=[Noise()] if noise else [],
    )
    hypotheses = []
    rows = zip(found.sequences.tolist(), found.sequences_scores, found.beam_indices, strict=True)
    for sequence, score, beam_indices in rows:
        length = int((beam_indices >= 0).sum())
        token_ids = sequence[len(prompt) : len(prompt) + length]
        hypotheses.append({"token_ids": token_ids, "score": float(str(score.numpy()))})
    return hypotheses


def searched(model: Any, prompt: list[int], case: dict[str, Any]) -> dict[str, Any] | None:
    """Returns the case with its result, or None where another rounding could change it."""
    found = search(model, prompt, case)
    noisy = search(model, prompt, case, noise=True)
    if [h["token_ids"] for h in noisy] != [h["token_ids"] for h in found]:
        return None
    return case | {"hypotheses": found}


def make_tables() -> list[dict[str, Any]]:
    penalties = (*LENGTH_PENALTIES, -1.0)
    settings = itertools.product(BEAM_WIDTHS, penalties, EARLY_STOPPING)
    seeds, tables = itertools.count(), []
    for index, (width, penalty, early_stopping) in enumerate(settings):
        setting = {
            "beam_width": width,
            "length_penalty": penalty,
            "early_stopping": early_stopping,
        }
        table = None
        while table is None:
            table = make_table(setting, np.random.RandomState(next(seeds)), index % 4)
        tables.append(table)
    return tables


def make_table(
    setting: dict[str, Any], random: np.random.RandomState, num_ends: int
) -> dict[str, Any] | None:
    """Returns a random case, or None where hypotheses tie: torch leaves open which comes first."""
    size = int(random.randint(9, 13))
    logits = random.standard_normal((size, size)).astype(np.float32) * 2
    ends = random.permutation(size)[:num_ends].tolist()
    logits[:, ends] += random.uniform(-2, 3)
    case = setting | {"max_tokens": int(random.randint(1, 20)), "end_token_ids": ends}
    first = int(random.randint(size))
    found = search(TableModel(torch.from_numpy(logits)), [first], case)
    if len({hypothesis["score"] for hypothesis in found}) < len(found):
        return None
    logprobs = torch.nn.functional.log_softmax(torch.from_numpy(logits), dim=-1).numpy()
    # The shortest decimals that give the same float32.
    rows = [[float(str(value)) for value in row] for row in logprobs]
    return case | {"first_token_id": first, "logprobs": rows, "hypotheses": found}


def settings() -> list[dict[str, Any]]:
    """Returns every pair of length penalty and early stopping, with the beam widths in turn."""
    pairs = itertools.product(EARLY_STOPPING, LENGTH_PENALTIES)
    return [
        {
            "beam_width": BEAM_WIDTHS[(index + index // 4) % 3],
            "length_penalty": penalty,
            "early_stopping": early_stopping,
        }
        for index, (early_stopping, penalty) in enumerate(pairs)
    ]


def make_tiny() -> dict[str, Any]:
    cases = {}
    for name in TINY_MODELS:
        model, found = tiny_oracle(CASES[name]), []
        for index, setting in enumerate(settings()):
            # An end token that comes up: random models do not say their own.
            ends = [[], [67], [29, 50]][index % 3]
            case = setting | {"max_tokens": 16, "end_token_ids": ends}
            found.append(searched(model, PROMPT, case))
        cases[name] = [case for case in found if case is not None]
        print(f"{name}: {len(cases[name])} of {len(found)} cases")
    return cases


def make_default() -> list[dict[str, Any]]:
    tokenizer, model = load_tokenizer(None), load_default_model()
    found = []
    for index, question in enumerate(QUESTIONS):
        text = tokenizer.apply_chat_template([{"role": "user", "content": question}])
        prompt = tokenizer.encode(text, add_special_tokens=False)
        cases = []
        for setting in settings()[index :: len(QUESTIONS)]:
            case = setting | {"max_tokens": 20, "end_token_ids": list(tokenizer.eos_token_ids)}
            cases.append(searched(model, prompt, case))
            print(question, setting, cases[-1] is not None, flush=True)
        kept = [case for case in cases if case is not None]
        found.append({"prompt_token_ids": prompt, "cases": kept})
    return found


if __name__ == "__main__":
    main()
