"""Compiles steps of the engine for TPUs that are not there.

    python -m jpaged.plan.compile_target < jobs.jsonl

A job is a JSON object on a line (`Job`), and so is what came of it (`Compiled`). One process
compiles for any targets, whatever slice libtpu was told of as it was loaded: a job names its own.
"""

import dataclasses
import gc
import json
import os
import sys
import time
from typing import Any

OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What to compile.

    Attributes:
        topology_name: Of the slice, as JAX calls it.
        accelerator_type: Of the slice, as libtpu calls it.
        model: As `plan.models.read_model` takes it.
        dtype: Of weights and pools.
        tensor_parallel_size: Devices to compile for, the first ones of the slice.
        block_size: Tokens of a block.
        num_blocks: Blocks of the pool to compile with.
        max_model_len: Tokens of a block table.
        max_num_seqs: Rows of the sampler's state.
        max_logprobs: Of a request.
        num_tokens: Of the step; as many as `num_seqs` where all of them decode.
        num_seqs: Of the step.
        decode_only: Whether every sequence decodes.
        plain: Whether nobody asks for more than the likeliest token or a draw.
    """

    topology_name: str
    accelerator_type: str
    model: str | None
    dtype: str
    tensor_parallel_size: int
    block_size: int
    num_blocks: int
    max_model_len: int
    max_num_seqs: int
    max_logprobs: int
    num_tokens: int
    num_seqs: int
    decode_only: bool
    plain: bool


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Compiled:
    """What the compiler says of a step; bytes are a device's.

    Attributes:
        weight_bytes: Of the weights, as they lie in the arguments.
        pool_bytes: Of the pools.
        argument_bytes: Of all arguments: weights, pools, the sampler's state, the batch.
        output_bytes: Of all that comes out, what is updated in place included.
        alias_bytes: Of what is updated in place.
        temp_bytes: Of what the step needs beside its arguments.
        code_bytes: Of the program.
        cycles: The compiler's estimate of a run, kernels and collectives left out.
        kernels: How often each of our kernels stands in the program, by name.
        kernel_vmem_bytes: VMEM of the kernel that has the most.
        collectives: How often devices exchange something, by how they do.
        lower_s: How long tracing and lowering took.
        compile_s: How long the compiler took.
        compile_cpu_s: Seconds of all cores that it took; other work changes those less.
        error: Why there is no program, in the compiler's words; nothing else holds then.
    """

    weight_bytes: int = 0
    pool_bytes: int = 0
    argument_bytes: int = 0
    output_bytes: int = 0
    alias_bytes: int = 0
    temp_bytes: int = 0
    code_bytes: int = 0
    cycles: int = 0
    kernels: dict[str, int] = dataclasses.field(default_factory=dict)
    kernel_vmem_bytes: int = 0
    collectives: dict[str, int] = dataclasses.field(default_factory=dict)
    lower_s: float = 0.0
    compile_s: float = 0.0
    compile_cpu_s: float = 0.0
    error: str = ""


def environment(job: Job) -> dict[str, str]:
    """What libtpu and JAX must find in the environment before they are loaded.

    The slice is that of the process's first job; others compile to the same programs in it.
    """
    return {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": job.accelerator_type,
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": "false",
    }


def compile_step(job: Job) -> Compiled:
    """Compiles the step of a job; an `environment` must be this process's before JAX is loaded."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies

    from jpaged.compile_plan import StepShape
    from jpaged.models.causal_lm import CausalLM
    from jpaged.models.sharding import make_mesh
    from jpaged.pallas_kernels import KVCacheSpec, preferred_layout, set_target_platform
    from jpaged.plan import program
    from jpaged.plan.cycles import estimated_cycles
    from jpaged.plan.models import read_model
    from jpaged.step import StepFunction

    set_target_platform("tpu")
    topology = topologies.get_topology_desc(platform="tpu", topology_name=job.topology_name)
    model = CausalLM(
        read_model(job.model), dtype=job.dtype, tensor_parallel_size=job.tensor_parallel_size
    )
    spec = KVCacheSpec(
        block_size=job.block_size,
        num_kv_heads=model.local_config.num_kv_heads,
        head_dim=model.config.head_dim,
        dtype=jnp.dtype(job.dtype),
        layout=preferred_layout(model.config.head_dim),
    )
    mesh = make_mesh(job.tensor_parallel_size, topology.devices)
    step = StepFunction(
        model,
        spec,
        num_rows=job.max_num_seqs,
        max_blocks_per_seq=-(-job.max_model_len // job.block_size),
        max_logprobs=job.max_logprobs,
        mesh=mesh,
    )
    shape = StepShape(job.num_tokens, job.num_seqs, job.decode_only, job.plain)
    start = time.perf_counter()
    lowered = step.lower(shape, job.num_blocks, platform="tpu")
    lower_s = time.perf_counter() - start
    start, cpu_start = time.perf_counter(), time.process_time()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if OUT_OF_MEMORY not in str(error):
            raise
        return Compiled(
            error=str(error).splitlines()[0],
            lower_s=lower_s,
            compile_s=time.perf_counter() - start,
        )
    compile_s, compile_cpu_s = time.perf_counter() - start, time.process_time() - cpu_start
    analysis = compiled.memory_analysis()
    assert analysis is not None, "the TPU compiler told no memory"
    text = compiled.as_text() or ""
    not_aliased = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return Compiled(
        weight_bytes=_share_bytes(model.abstract_params, model.param_specs, mesh),
        pool_bytes=spec.block_bytes * job.num_blocks * model.config.num_layers,
        argument_bytes=analysis.argument_size_in_bytes,
        output_bytes=analysis.output_size_in_bytes,
        alias_bytes=analysis.alias_size_in_bytes,
        # As the engine counts it (`StepFunction.temp_bytes`).
        temp_bytes=analysis.temp_size_in_bytes + max(not_aliased, 0),
        code_bytes=analysis.generated_code_size_in_bytes,
        cycles=estimated_cycles(text),
        kernels=program.kernels(text),
        kernel_vmem_bytes=program.kernel_vmem_bytes(text),
        collectives=program.collectives(text),
        lower_s=lower_s,
        compile_s=compile_s,
        compile_cpu_s=compile_cpu_s,
    )


def _share_bytes(params: Any, specs: Any, mesh: Any) -> int:
    import jax

    def of(leaf: Any, spec: Any) -> int:
        share = jax.sharding.NamedSharding(mesh, spec).shard_shape(leaf.shape)
        return jax.ShapeDtypeStruct(share, leaf.dtype).size * leaf.dtype.itemsize

    return sum(jax.tree.leaves(jax.tree.map(of, params, specs)))


def main() -> None:
    """Reads jobs and writes what came of each."""
    # Tracing leaves little garbage and many objects: looking for it took a twelfth of its time.
    gc.disable()
    for line in sys.stdin:
        job = Job(**json.loads(line))
        os.environ.update(environment(job))
        print(json.dumps(dataclasses.asdict(compile_step(job))), flush=True)


if __name__ == "__main__":
    main()
