"""Launches and bytes of a program that was written by hand."""

import pytest

from benchmarks.launches import Program

TEXT = """HloModule jit_step, is_scheduled=true

%fused_add (param_0: f32[8,4], param_1: f32[8,4]) -> f32[8,4] {
  %param_0 = f32[8,4]{1,0} parameter(0)
  %param_1 = f32[8,4]{1,0} parameter(1)
  ROOT %add = f32[8,4]{1,0} add(%param_0, %param_1)
}

%fused_update (param_0: f32[8,4], param_1: f32[8,4], param_2: s32[]) -> f32[8,4] {
  %param_0 = f32[8,4]{1,0} parameter(0)
  %param_1 = f32[8,4]{1,0} parameter(1)
  %param_2 = s32[] parameter(2)
  %zero = s32[] constant(0)
  %slice = f32[1,4]{1,0} dynamic-slice(%param_1, %param_2, %zero), dynamic_slice_sizes={1,4}
  ROOT %put = f32[8,4]{1,0} dynamic-update-slice(%param_0, %slice, %param_2, %zero)
}

%body (state: (s32[], f32[8,4], f32[8,4])) -> (s32[], f32[8,4], f32[8,4]) {
  %state = (s32[], f32[8,4]{1,0}, f32[8,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %x = f32[8,4]{1,0} get-tuple-element(%state), index=1
  %y = f32[8,4]{1,0} get-tuple-element(%state), index=2
  %fusion.1 = f32[8,4]{1,0} fusion(%x, %y, %i), kind=kLoop, calls=%fused_update
  ROOT %new = (s32[], f32[8,4]{1,0}, f32[8,4]{1,0}) tuple(%i, %fusion.1, %y)
}

ENTRY %main (a: f32[8,4], b: f32[8,4], i: s32[]) -> f32[8,4] {
  %a = f32[8,4]{1,0} parameter(0)
  %b = f32[8,4]{1,0} parameter(1)
  %i.1 = s32[] parameter(2)
  %barrier = (f32[8,4]{1,0}) tuple(%a)
  %same = f32[8,4]{1,0} get-tuple-element(%barrier), index=0
  %twice = f32[8,4]{1,0} fusion(%a, %same), kind=kLoop, calls=%fused_add
  %start = (s32[], f32[8,4]{1,0}, f32[8,4]{1,0}) tuple(%i.1, %twice, %b)
  %while = (s32[], f32[8,4]{1,0}, f32[8,4]{1,0}) while(%start), body=%body, TRIPS
  ROOT %result = f32[8,4]{1,0} get-tuple-element(%while), index=1
}
""".replace("TRIPS", 'backend_config={"known_trip_count":{"n":"8"}}')


def test_a_loop_counts_as_often_as_it_runs_and_a_slice_as_what_it_takes() -> None:
    totals = Program(TEXT).totals()
    assert totals.launches == 1 + 8
    # One array that two names have is read once; a round reads a row and its number.
    assert totals.read == 8 * 4 * 4 + 8 * (4 * 4 + 4)
    assert totals.written == 8 * 4 * 4 + 8 * 4 * 4
    assert "fusion.1" in "\n".join(Program(TEXT).listing())


def test_what_is_no_program_is_refused() -> None:
    with pytest.raises(ValueError, match="ENTRY"):
        Program("nothing")
    with pytest.raises(ValueError, match="how often"):
        Program(TEXT.replace("known_trip_count", "unknown")).totals()
