"""Failures these tests catch: variants timed one after the other, so that a warming machine favours the last; a
variant that runs out of memory and takes the others along; an error of ours that goes by as a gap; ratios upside
down; rows that lack a key or a number; a run that does not end in time.
"""

import json

import pytest
import torch

from bench.kernels.cases import BASE, BF16, F32, Case, Mixture
from bench.kernels.rows import KEYS, compare_with_torch
from bench.kernels.runner import (
    MAX_ROUNDS,
    MIN_ROUNDS,
    NO_TIME_LEFT,
    ROUNDS_IN_HASTE,
    Runner,
    is_out_of_memory,
)
from bench.kernels.timing import CpuClock, Roof, Sample, quantile
from bench.kernels.variants import TORCH_FUSED, Built, CannotDoError, Variant

CPU = torch.device("cpu")
CASE = Case(2000, 20, Mixture(F32, F32, F32))


class FakeClock:
    """Seconds by the kind of step, and the order in which steps were timed."""

    device = CPU

    def __init__(self):
        self.seconds = {}
        self.order = []

    def flush(self):
        pass

    def sample(self, step, previous=None):
        name = getattr(step, "variant", "copy")
        self.order.append(name)
        step()
        return Sample(self.seconds.get(name, 1.0), sleep=0.0)

    def peak_bytes(self, step):
        step()
        return 123


def variant(name, *, num_bytes=1000, error=None, error_in_step=None, at_call=1, state=F32, is_ours=False):
    """A variant that does nothing, or fails while it is built or at one of its steps."""

    def build(problem):
        if error is not None:
            raise error
        calls = []

        def step():
            calls.append(1)
            if error_in_step is not None and len(calls) == at_call:
                raise error_in_step

        step.variant = name
        return Built(step, num_bytes, F32, state)

    return Variant(name, build, is_ours)


def run(variants, case=CASE, clock=None, roof_bytes=500):
    """One case, in the fewest rounds."""
    runner = Runner(variants, clock or FakeClock(), Roof(CPU, roof_bytes), 1.0)
    return runner.run_case(case, seconds=0.0), runner


def by_variant(rows):
    assert len({row["variant"] for row in rows}) == len(rows)
    return {row["variant"]: row for row in rows}


def test_rounds_interleave_the_variants_and_the_copies():
    clock = FakeClock()
    run([variant("a"), variant("b")], clock=clock)
    assert clock.order == ["a", "b", "copy", "copy"] * MIN_ROUNDS


def test_rows_have_every_key_and_are_json():
    rows, _ = run([variant("a"), variant("b", error=CannotDoError("not this")), TORCH_FUSED])
    assert len(rows) == 4
    for row in rows:
        assert tuple(row) == KEYS
        assert row == json.loads(json.dumps(row, allow_nan=False))
        assert row["timestamp"].endswith("+00:00")
    measured = by_variant(rows)["a"]
    filled = {key for key in KEYS if measured[key] is not None}
    assert set(KEYS) - filled <= {"reason", "driver", "triton", "commit", "dirty"}


def test_numbers_of_a_row():
    clock = FakeClock()
    clock.seconds = {"a": 2.0, "torch_fused": 3.0, "copy": 0.5}
    rows, _ = run([variant("a", num_bytes=4_000), variant("torch_fused", num_bytes=8_000)], clock=clock)
    row = by_variant(rows)["a"]
    assert (row["seconds_median"], row["seconds_min"], row["samples"]) == (2.0, 2.0, MIN_ROUNDS)
    assert row["gb_per_s"] == pytest.approx(4_000 / 2.0 / 1e9)
    assert row["copy_gb_per_s"] == pytest.approx(2 * 500 / 0.5 / 1e9)
    assert row["percent_of_copy"] == pytest.approx(100)
    assert row["time_ratio_to_torch"] == pytest.approx(3.0 / 2.0)  # above 1 where ours is the faster one
    assert row["byte_ratio_to_torch"] == pytest.approx(8_000 / 4_000)
    assert row["peak_bytes"] == 123


def test_the_copy_is_as_large_as_the_step_but_no_larger_than_the_roof():
    rows, _ = run([variant("a", num_bytes=600)])
    assert by_variant(rows)["copy"]["bytes"] == 600
    rows, _ = run([variant("a", num_bytes=6000)])
    assert by_variant(rows)["copy"]["bytes"] == 1000


def test_quantiles():
    values = [5.0, 1.0, 4.0, 2.0, 3.0, 6.0]
    assert [quantile(values, q) for q in (0, 0.2, 0.5, 0.8, 1)] == [1, 2, 3.5, 5, 6]
    assert quantile([7.0], 0.2) == 7.0


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7.45 GiB.\nMore text"),
        RuntimeError("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA`"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
    ],
)
@pytest.mark.parametrize("when", ["build", "first step", "second step", "fourth step"])
def test_what_runs_out_of_memory_gets_a_row_and_the_others_go_on(error, when):
    call = {"first step": 1, "second step": 2, "fourth step": 4}.get(when)
    thirsty = {"error": error} if call is None else {"error_in_step": error, "at_call": call}
    rows, runner = run([variant("a"), variant("big", **thirsty, is_ours=True), variant("torch_fused")])
    found = by_variant(rows)
    assert set(found) == {"a", "big", "torch_fused", "copy"}
    assert found["big"]["measured"] is False
    assert found["big"]["reason"].startswith("out of memory: ")
    assert "\n" not in found["big"]["reason"]
    assert found["big"]["seconds_median"] is None
    assert found["a"]["samples"] == found["torch_fused"]["samples"] == MIN_ROUNDS
    assert runner.failures == []


def test_a_case_that_does_not_fit_at_all_has_a_row_for_each_variant(monkeypatch):
    monkeypatch.setattr("bench.kernels.runner.Problem", None)
    rows, runner = run([variant("a"), variant("b")])
    assert {name: row["measured"] for name, row in by_variant(rows).items()} == {"a": False, "b": False}
    assert len(runner.failures) == 1


def test_errors_of_ours_are_failures_and_of_others_are_gaps():
    for is_ours in (True, False):
        rows, runner = run([variant("a", error=TypeError("no such argument"), is_ours=is_ours)])
        assert by_variant(rows)["a"]["reason"] == "TypeError: no such argument"
        assert bool(runner.failures) is is_ours
    rows, runner = run([variant("a", error=CannotDoError("not this mixture"), is_ours=True)])
    assert by_variant(rows)["a"]["reason"] == "not this mixture"
    assert runner.failures == []


def test_a_run_without_time_does_its_first_case_and_says_so_of_the_others():
    runner = Runner([variant("a")], FakeClock(), Roof(CPU, 500), seconds=1e-9)
    rows = list(runner.run([CASE, Case(300, 3), Case(400, 4)]))
    assert [row["measured"] for row in rows if row["variant"] == "a"] == [True, False, False]
    assert all(row["reason"].startswith(NO_TIME_LEFT) for row in rows if not row["measured"])
    assert rows[0]["samples"] == ROUNDS_IN_HASTE  # and does not go on with that one for long


def test_a_run_with_time_takes_more_rounds():
    runner = Runner([variant("a")], FakeClock(), Roof(CPU, 500), seconds=30.0)
    assert {row["samples"] for row in runner.run([CASE])} == {MAX_ROUNDS}


def test_no_ratio_without_torch():
    rows, _ = run([variant("a"), variant("torch_fused", error=MemoryError())])
    row = by_variant(rows)["a"]
    assert (row["time_ratio_to_torch"], row["byte_ratio_to_torch"]) == (None, None)
    assert "not measured" in row["baseline"]


def test_the_baseline_names_other_dtypes_with_both_byte_counts():
    case = Case(2000, 20, BASE)
    ours = variant("a", num_bytes=22 * 2000)
    ours = Variant("a", lambda problem: Built(lambda: None, 22 * 2000, BF16, F32))
    rows, _ = run([ours, TORCH_FUSED], case=case, clock=CpuClock(flush_bytes=1))
    found = by_variant(rows)
    assert (found["torch_fused"]["state_dtype"], found["a"]["state_dtype"]) == ("bf16", "fp32")
    assert found["torch_fused"]["baseline"] == "torch_fused, same dtypes"
    assert f"{16 * 2000} bytes" in found["a"]["baseline"]  # 14 a parameter, and 2 for the norms
    assert f"{22 * 2000} bytes" in found["a"]["baseline"]
    assert found["a"]["byte_ratio_to_torch"] == pytest.approx(16 / 22)


def test_a_host_that_is_late_is_told():
    class LateClock(FakeClock):
        def sample(self, step, previous=None):
            return super().sample(step, previous)._replace(host_late=True)

    rows, _ = run([variant("a")], clock=LateClock())
    assert "host" in by_variant(rows)["a"]["reason"]


def test_a_cpu_cannot_tell_peak_memory():
    rows, _ = run([variant("a")], clock=CpuClock(flush_bytes=1))
    row = by_variant(rows)["a"]
    assert row["peak_bytes"] is None
    assert "peak memory" in row["reason"]


def test_comparing_changes_nothing_else():
    rows, _ = run([variant("a"), variant("torch_fused")])
    before = dict(by_variant(rows)["a"])
    compare_with_torch(by_variant(rows)["a"], by_variant(rows)["torch_fused"])
    assert before == by_variant(rows)["a"]


def test_other_errors_are_not_about_memory():
    assert not is_out_of_memory(RuntimeError("expected scalar type Float"))
