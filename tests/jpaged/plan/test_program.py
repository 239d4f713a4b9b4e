"""What runs in a compiled program, from its text."""

from jpaged.plan import program

TEXT = """\
HloModule jit_step, is_scheduled=true

%rare (p: bf16[8,128]) -> bf16[8,128] {
  ROOT %jpaged_copy_blocks.2 = bf16[8,128]{1,0} custom-call(%p), custom_call_target="tpu_custom_call", backend_config={"used_scoped_memory_configs":[{"memory_space":"1","offset":"0","size":"3000"}]}
}

ENTRY %main (p0: bf16[8,128]) -> bf16[8,128] {
  %p0 = bf16[8,128]{1,0} parameter(0)
  %jpaged_write_kv.2.pool_ref = bf16[8,128]{1,0} custom-call(%p0), custom_call_target="tpu_custom_call", backend_config={"used_scoped_memory_configs":[{"memory_space":"1","offset":"0","size":"1000"}]}
  %jpaged_write_kv.3.pool_ref = bf16[8,128]{1,0} custom-call(%p0), custom_call_target="tpu_custom_call", backend_config={"used_scoped_memory_configs":[{"memory_space":"1","offset":"0","size":"1000"}]}
  %TopK.1 = (f32[8,2]{1,0}, s32[8,2]{1,0}) custom-call(%p0), custom_call_target="TopK"
  %large = bf16[8,128]{1,0} fusion(%jpaged_write_kv.2.pool_ref), backend_config={"used_scoped_memory_configs":[{"memory_space":"1","offset":"0","size":"9000"}]}
  %all-reduce.1 = bf16[8,128]{1,0} all-reduce(%large), replica_groups={{0,1}}
  %all-gather-start = (bf16[8,128]{1,0}, bf16[16,128]{1,0}) all-gather-start(%large), dimensions={0}
  %all-gather-done = bf16[16,128]{1,0} all-gather-done(%all-gather-start)
  ROOT %all-reduce.2 = bf16[8,128]{1,0} all-reduce(%all-reduce.1), replica_groups={{0,1}}
}
"""  # noqa: E501


def test_kernels_go_by_the_names_they_were_given():
    assert program.kernels(TEXT) == {"jpaged_copy_blocks": 1, "jpaged_write_kv": 2}


def test_the_memory_of_kernels_is_not_that_of_other_fusions():
    assert program.kernel_vmem_bytes(TEXT) == 3000
    assert program.kernel_vmem_bytes("ENTRY %main () -> f32[] {\n}") == 0


def test_both_halves_of_a_collective_are_one():
    assert program.collectives(TEXT) == {"all-reduce": 2, "all-gather": 1}
