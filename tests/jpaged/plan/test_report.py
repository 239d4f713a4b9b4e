"""A plan as text and as JSON."""

import dataclasses
import json

from jpaged.plan import report
from jpaged.plan.planner import StepEstimate, make_plan
from jpaged.plan.targets import parse_target

GOLDEN = """\
llama-3-8b: LlamaForCausalLM, 32 layers, sequences of up to 8192 tokens, 1024 on average

target  devices  fits  weights  state  temp  blocks  seqs  decode ms  by        bound   tokens/s  prefill tok/s
h200          1  yes     14.96   0.28  1.11   54384   849      12.00  compiler  memory     21333          64000
v5e-8     2 x 4  yes     14.96   0.28  1.11   54384  1698      10.00  roofline  memory     51200         128000
t4            1  no      14.96   0.28  1.11
"""  # noqa: E501


def plan_of_three():
    plan = make_plan("llama-3-8b", ["h200", "t4"])
    h200, t4 = plan.targets
    decode = StepEstimate(num_tokens=256, roofline_s=0.010, compiler_s=0.012, bound="memory")
    prefill = StepEstimate(num_tokens=8192, roofline_s=0.128, compiler_s=None, bound="tensor cores")
    h200 = dataclasses.replace(h200, decode=decode, prefill=prefill)
    v5e = dataclasses.replace(
        h200,
        target=parse_target("v5e-8"),
        tensor_parallel_size=4,
        replicas=2,
        decode=dataclasses.replace(decode, compiler_s=0.009),
        notes=("a note",),
    )
    return dataclasses.replace(plan, targets=(h200, v5e, t4))


def test_the_text():
    text = report.render(plan_of_three())
    assert text.startswith(GOLDEN)
    lines = text.splitlines()
    assert (
        "v5e-8: jpaged serve --model llama-3-8b --tensor-parallel-size 4 --max-model-len 8192 "
        "--max-num-seqs 256 --max-num-batched-tokens 2048 --block-size 16 --memory-utilization 0.9"
    ) in lines
    assert lines[lines.index("  a note") - 1].startswith("v5e-8: ")
    [refused] = [line for line in lines if line.startswith("t4: ")]
    assert refused.startswith("t4: does not fit: needs 17.")
    assert refused.endswith("--target t4-2 should do")


def test_a_slice_of_several_hosts_has_a_process_on_each():
    plan = plan_of_three()
    v5e = dataclasses.replace(
        plan.targets[1], target=parse_target("v5e-16"), tensor_parallel_size=16, replicas=1
    )
    command = "jpaged serve --model llama-3-8b --tensor-parallel-size 16 --nnodes 4 --max-model-len"
    assert report.command(plan, v5e).startswith(command)
    assert "--nnodes" not in report.command(plan, plan.targets[1])


def test_the_json_has_every_figure():
    found = json.loads(json.dumps(report.as_json(plan_of_three())))
    assert (found["model"], found["context_len"]) == ("llama-3-8b", 1024)
    h200, v5e, t4 = found["targets"]
    assert h200["num_blocks"] == 54384
    assert h200["decode"]["source"] == "compiler"
    assert h200["decode"]["tokens_s"] * 0.012 == 256
    assert h200["command"].startswith("jpaged serve --model llama-3-8b")
    assert (v5e["num_devices"], v5e["replicas"], v5e["notes"]) == (8, 2, ["a note"])
    assert (t4["decode"], t4["command"]) == (None, "")
    assert t4["why_not"]
