"""Failures these tests catch: variants timed one after the other, so that a warming machine favours the last; caches
that are warm; a variant that runs out of memory and takes the others along; an error of ours that goes by as a gap;
ratios upside down; rows that lack a key or a number; a run that does not end in time.
"""

import json
from types import SimpleNamespace

import pytest
import torch

from bench.kernels import rows as rows_of_run
from bench.kernels import runner as runners
from bench.kernels.cases import BASE, BF16, F32, Case, Mixture
from bench.kernels.rows import KEYS
from bench.kernels.runner import MAX_ROUNDS, MIN_ROUNDS, NO_TIME_LEFT, ROUNDS_IN_HASTE, Runner
from bench.kernels.timing import CpuClock, Roof, Sample, cpu_cache_bytes, interleaved, quantile
from bench.kernels.variants import TORCH_FUSED, Built, CannotDoError, Variant

CPU = torch.device("cpu")
CASE = Case(2000, 20, Mixture(F32, F32, F32))


class GivenClock(CpuClock):
    """Takes steps, and tells the seconds it was given for their variants; the copies are named copy."""

    def __init__(self, **seconds):
        super().__init__(flush_bytes=1)
        self.seconds = seconds
        self.order = []

    def sample(self, step, previous=None):
        name = getattr(step, "variant", "copy")
        self.order.append(name)
        step()
        return Sample(self.seconds.get(name, 1.0))


def variant(name, *, num_bytes=1000, error=None, at_step=0, is_ours=False):
    """A variant that does nothing, or fails while it is built or at one of its steps."""

    def build(problem):
        if error is not None and at_step == 0:
            raise error
        calls = []

        def step():
            calls.append(1)
            if error is not None and len(calls) == at_step:
                raise error

        step.variant = name
        return Built(step, num_bytes, F32, F32)

    return Variant(name, build, is_ours)


def run(*variants, case=CASE, clock=None):
    """One case, in the fewest rounds; rows by variant."""
    runner = Runner(variants, clock or GivenClock(), Roof(CPU, 500), 1.0)
    rows = runner.run_case(case, seconds=0.0)
    assert len({row["variant"] for row in rows}) == len(rows)
    return {row["variant"]: row for row in rows}, runner


def test_rounds_interleave_the_variants_and_the_copies():
    clock = GivenClock()
    run(variant("a"), variant("b"), clock=clock)
    assert clock.order == ["a", "b", "copy", "copy"] * MIN_ROUNDS


def test_turns_take_every_step_once_in_changing_order_after_it_was_prepared():
    log = []
    times = interleaved(
        {name: lambda name=name: log.append(name) for name in "abc"},
        0.0,
        prepare=lambda name: log.append(f"prepare {name}"),
        repeats=2,
    )
    assert {name: len(sample) for name, sample in times.items()} == dict.fromkeys("abc", 3)
    turns = [tuple(log[start : start + 9 : 3]) for start in range(0, 27, 9)]
    assert all(sorted(turn) == ["prepare a", "prepare b", "prepare c"] for turn in turns)
    assert len(set(turns)) > 1
    assert all(log[i + 1] == log[i + 2] == log[i].split()[1] for i in range(0, 27, 3))


def test_rows_have_every_key_and_are_json():
    rows, _ = run(variant("a"), variant("b", error=CannotDoError("not this")), TORCH_FUSED)
    assert set(rows) == {"a", "b", "torch_fused", "copy"}
    for row in rows.values():
        assert tuple(row) == KEYS
        assert row == json.loads(json.dumps(row, allow_nan=False))
        assert row["timestamp"].endswith("+00:00")
    filled = {key for key in KEYS if rows["a"][key] is not None}
    assert set(KEYS) - filled <= {"reason", "driver", "triton", "commit", "dirty", "peak_bytes"}
    assert "peak memory" in rows["a"]["reason"]  # a CPU cannot tell


def test_numbers_of_a_row():
    clock = GivenClock(a=2.0, torch_fused=3.0, copy=0.5)
    rows, _ = run(variant("a", num_bytes=600), variant("torch_fused", num_bytes=1200), clock=clock)
    row = rows["a"]
    assert (row["seconds_median"], row["seconds_min"], row["samples"]) == (2.0, 2.0, MIN_ROUNDS)
    assert row["gb_per_s"] == pytest.approx(600 / 2.0 / 1e9)
    assert row["copy_gb_per_s"] == pytest.approx(2 * 500 / 0.5 / 1e9)  # read and written
    assert row["percent_of_copy"] == pytest.approx(15)
    assert row["time_ratio_to_torch"] == pytest.approx(3.0 / 2.0)  # above 1 where ours is the faster one
    assert row["byte_ratio_to_torch"] == pytest.approx(1200 / 600)
    assert rows["copy"]["bytes"] == 1000  # as large as the largest step, but no larger than the roof


def test_quantiles():
    values = [5.0, 1.0, 4.0, 2.0, 3.0, 6.0]
    assert [quantile(values, q) for q in (0, 0.2, 0.5, 0.8, 1)] == [1, 2, 3.5, 5, 6]
    assert quantile([7.0], 0.2) == 7.0


@pytest.mark.parametrize(
    ("error", "at_step"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7.45 GiB.\nMore text"), 0),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7.45 GiB."), 1),
        (RuntimeError("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA`"), 2),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."), 4),
    ],
)
def test_what_runs_out_of_memory_gets_a_row_and_the_others_go_on(error, at_step):
    big = variant("big", error=error, at_step=at_step, is_ours=True)
    rows, runner = run(variant("a"), big, variant("torch_fused"))
    assert set(rows) == {"a", "big", "torch_fused", "copy"}
    assert rows["big"]["measured"] is False
    assert rows["big"]["reason"].startswith("out of memory: ")
    assert "\n" not in rows["big"]["reason"]
    assert rows["big"]["seconds_median"] is None
    assert rows["a"]["samples"] == rows["torch_fused"]["samples"] == MIN_ROUNDS
    assert runner.failures == []


def test_a_case_that_does_not_fit_at_all_has_a_row_for_each_variant(monkeypatch):
    monkeypatch.setattr("bench.kernels.runner.Problem", None)
    rows, runner = run(variant("a"), variant("b"))
    assert {name: row["measured"] for name, row in rows.items()} == {"a": False, "b": False}
    assert len(runner.failures) == 1


def test_a_device_in_error_loses_no_row(monkeypatch):
    """Every call of the device fails then, that which frees its memory too."""

    def failing():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    clock = GivenClock()
    clock.device = SimpleNamespace(type="cuda")
    monkeypatch.setattr(runners, "Problem", lambda case, device: failing())
    monkeypatch.setattr(torch.cuda, "empty_cache", failing)
    monkeypatch.setattr(runners, "describe_environment", lambda device: {})
    rows, runner = run(variant("ours", is_ours=True), variant("theirs"), clock=clock)
    assert {row["reason"] for row in rows.values()} == {
        "RuntimeError: CUDA error: an illegal memory access was encountered"
    }
    assert list(rows) == ["ours", "theirs"]
    assert len(runner.failures) == 1


@pytest.mark.parametrize(
    ("error", "is_ours", "reason", "failures"),
    [
        (TypeError("no such argument"), True, "TypeError: no such argument", 1),
        (TypeError("no such argument"), False, "TypeError: no such argument", 0),
        (CannotDoError("not this mixture"), True, "not this mixture", 0),
    ],
)
def test_errors_of_ours_are_failures_and_of_others_are_gaps(error, is_ours, reason, failures):
    rows, runner = run(variant("a", error=error, is_ours=is_ours), variant("torch_fused"))
    assert rows["a"]["reason"] == reason
    assert len(runner.failures) == failures


@pytest.mark.parametrize(
    ("seconds", "measured", "samples"),
    [(1e-9, [True, False], ROUNDS_IN_HASTE), (60.0, [True, True], MAX_ROUNDS)],
)
def test_a_run_without_time_does_its_first_case_in_haste_and_says_so_of_the_others(
    seconds, measured, samples
):
    runner = Runner([variant("a")], GivenClock(), Roof(CPU, 500), seconds)
    rows = [row for row in runner.run([CASE, Case(300, 3)]) if row["variant"] == "a"]
    assert [row["measured"] for row in rows] == measured
    assert all(row["reason"].startswith(NO_TIME_LEFT) for row in rows if not row["measured"])
    assert rows[0]["samples"] == samples


def test_no_ratio_without_torch():
    row = run(variant("a"), variant("torch_fused", error=MemoryError()))[0]["a"]
    assert (row["time_ratio_to_torch"], row["byte_ratio_to_torch"]) == (None, None)
    assert "not measured" in row["baseline"]


def test_the_baseline_names_other_dtypes_with_both_byte_counts():
    ours = Variant("a", lambda problem: Built(lambda: None, 22 * 2000, BF16, F32))
    rows, _ = run(ours, TORCH_FUSED, case=Case(2000, 20, BASE))
    assert (rows["torch_fused"]["state_dtype"], rows["a"]["state_dtype"]) == ("bf16", "fp32")
    assert rows["torch_fused"]["baseline"] == "torch_fused, same dtypes"
    assert f"{16 * 2000} bytes" in rows["a"]["baseline"]  # 14 a parameter, and 2 for the norms
    assert f"{22 * 2000} bytes" in rows["a"]["baseline"]
    assert rows["a"]["byte_ratio_to_torch"] == pytest.approx(16 / 22)


def test_a_host_that_is_late_is_told():
    class LateClock(GivenClock):
        def sample(self, step, previous=None):
            return super().sample(step, previous)._replace(host_late=True)

    assert "host" in run(variant("a"), clock=LateClock())[0]["a"]["reason"]


def test_a_cpu_sample_begins_with_cold_caches(monkeypatch):
    clock = CpuClock(flush_bytes=16)
    order = []
    monkeypatch.setattr(clock, "flush", lambda: order.append("flush"))
    assert clock.sample(lambda: order.append("step")).seconds > 0
    assert order == ["flush", "step"]
    assert CpuClock()._buffer.numel() >= 2 * cpu_cache_bytes() >= 64 << 20


def test_a_copy_moves_what_it_says():
    roof = Roof(CPU, 1000)
    roof.source.fill_(7)
    step, moved = roof.copy(600)
    step()
    assert moved == 600
    assert roof.target.tolist() == [7] * 300 + [0] * 700
    assert roof.copy(10**9)[1] == roof.moved_bytes == 2000


@pytest.mark.parametrize(("git", "expected"), [("f" * 40, ("f" * 40, True)), (None, ("a" * 40, None))])
def test_a_tree_without_history_has_the_commit_that_it_is_told(monkeypatch, git, expected):
    monkeypatch.setenv("GRASS_COMMIT", "a" * 40)
    monkeypatch.setattr(rows_of_run, "_output", lambda *command: git)
    assert rows_of_run._commit() == expected
