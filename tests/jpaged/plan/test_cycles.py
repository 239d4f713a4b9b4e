"""The compiler's cycles from the text of a program."""

import pytest

from jpaged.plan.cycles import estimated_cycles

PROGRAM = """\
HloModule jit_step, is_scheduled=true

%fused_computation (p: f32[8]) -> f32[8] {
  ROOT %inner = f32[8]{0} add(%p, %p), backend_config={"estimated_cycles":"1000000"}
}

%body (t: (s32[], f32[8])) -> (s32[], f32[8]) {
  %a = f32[8]{0} fusion(%x), kind=kLoop, calls=%fused_computation, backend_config={"estimated_cycles":"10"}
  ROOT %r = (s32[], f32[8]{0}) tuple(%i, %a)
}

%cond (t: (s32[], f32[8])) -> pred[] {
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%rare (p: f32[8]) -> f32[8] {
  ROOT %b = f32[8]{0} fusion(%p), kind=kLoop, calls=%fused_computation, backend_config={"estimated_cycles":"7000"}
}

%usual (p: f32[8]) -> f32[8] {
  ROOT %c = f32[8]{0} copy(%p), backend_config={"estimated_cycles":"3"}
}

ENTRY %main (p0: f32[8]) -> f32[8] {
  %p0 = f32[8]{0} parameter(0)
  %d = f32[8]{0} fusion(%p0), kind=kLoop, calls=%fused_computation, backend_config={"estimated_cycles":"500"}
  %unknown = f32[8]{0} fusion(%d), kind=kLoop, calls=%fused_computation, backend_config={"estimated_cycles":"9223372036854775807"}
  %kernel = f32[8]{0} custom-call(%d), custom_call_target="tpu_custom_call"
  %w = (s32[], f32[8]{0}) while(%t), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"4"}}
  %v = (s32[], f32[8]{0}) while(%w), condition=%cond, body=%body
  ROOT %if = f32[8]{0} conditional(%i, %d, %d), branch_computations={%rare, %usual}
}
"""  # noqa: E501


def test_loops_count_as_often_as_they_run_and_the_shortest_branch_counts():
    assert estimated_cycles(PROGRAM) == 500 + 4 * 10 + 10 + 3


def test_a_conditional_of_two_by_name():
    program = PROGRAM.replace(
        "branch_computations={%rare, %usual}", "true_computation=%rare, false_computation=%rare"
    )
    assert estimated_cycles(program) == 500 + 50 + 7000


def test_a_text_without_a_program_is_refused():
    with pytest.raises(ValueError, match="no entry computation"):
        estimated_cycles("HloModule nothing\n")
