"""Which beams survive in a real beam search: parents of every step, of the default model.

Usage: python -m benchmarks.paper.measure_beam_parents --workloads DIR

Runs `transformers`' beam search on the first turns of MT-Bench in the model's chat format, 2, 4 and
6 beams, and records for every step which beam each of the new beams continues. As in the paper's
runs, an end token ends nothing. Writes beam_parents.json beside this script: for each width one
string a prompt, k digits a step. Needs torch and transformers.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch  # pyright: ignore[reportMissingImports]

from benchmarks import common, transformers_oracle
from benchmarks.paper.beams import PARENTS_FILE, WIDTHS
from jpaged.tokenizer import load_tokenizer

BATCH = 8


def record(model: Any, prompts: list[list[int]], width: int, num_steps: int) -> list[str]:
    """Parents of every prompt of one batch, from the second step on."""
    steps: list[torch.Tensor] = []

    class Cache(transformers_oracle.transformers.DynamicCache):
        def reorder_cache(self, beam_idx: Any) -> None:
            steps.append(beam_idx.clone())
            super().reorder_cache(beam_idx)

    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    model.generate(
        ids,
        attention_mask=mask,
        past_key_values=Cache(config=model.config),
        num_beams=width,
        do_sample=False,
        max_new_tokens=num_steps + 1,
        eos_token_id=-1,  # none
        pad_token_id=0,
    )
    # The first reordering forks all beams from the prompt.
    parents = torch.stack(steps[1 : num_steps + 1]).view(-1, len(prompts), width)
    parents = parents - torch.arange(len(prompts)).view(1, -1, 1) * width
    assert bool(((parents >= 0) & (parents < width)).all()), "a parent in another prompt's beams"
    return ["".join(map(str, parents[:, i].flatten().tolist())) for i in range(len(prompts))]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workloads", type=Path, required=True, help="folder of prompts")
    parser.add_argument("--num-prompts", type=int, default=16, help="evenly spread over the 80")
    parser.add_argument("--num-steps", type=int, default=96)
    args = parser.parse_args()
    tokenizer = load_tokenizer(None)
    rows = common.load_workloads(args.workloads).load_prompts("mt_bench")
    texts = [
        f"<|im_start|>user\n{row['turns'][0]}<|im_end|>\n<|im_start|>assistant\n" for row in rows
    ]
    prompts = sorted((tokenizer.encode(text) for text in texts), key=len)
    prompts = [prompts[i * len(prompts) // args.num_prompts] for i in range(args.num_prompts)]
    model = transformers_oracle.load_default_model()
    parents: dict[str, list[str]] = {}
    with torch.inference_mode():
        for width in WIDTHS:
            found = parents[str(width)] = []
            for start in range(0, len(prompts), BATCH):
                found += record(model, prompts[start : start + BATCH], width, args.num_steps)
                print(f"{width} beams, {len(found)} of {len(prompts)} prompts", flush=True)
    report = {"model": "SmolLM2-135M-Instruct", "num_steps": args.num_steps, "parents": parents}
    PARENTS_FILE.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
