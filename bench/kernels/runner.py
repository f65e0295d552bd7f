"""The run: case by case, the variants of each interleaved, a row as soon as it is known."""

import contextlib
import gc
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from bench.kernels.cases import Case
from bench.kernels.problem import Comparison, Problem
from bench.kernels.rows import (
    Row,
    compare_with_torch,
    describe_environment,
    failed_row,
    measured_row,
)
from bench.kernels.timing import Clock, Roof, Sample, quantile
from bench.kernels.variants import Built, CannotDoError, Variant

MIN_ROUNDS, MAX_ROUNDS = 5, 50
ROUNDS_IN_HASTE = 2
NO_TIME_LEFT = "no time left after"


@dataclass
class _Entry:
    """A variant in a case, with what is known of it."""

    name: str
    built: Built
    error_ulps: float | None = None
    peak_bytes: int | None = None
    samples: list[Sample] = field(default_factory=list)


class Runner:
    """Run cases and yield rows.

    Args:
        variants: to compare. Those that share the problem's moments first: what others allocate comes on top.
        clock: times steps.
        roof: copies to compare with.
        seconds: for the whole run, over which a case that has begun may run by a few rounds; those that find no
            time left get rows that say so.
    """

    def __init__(self, variants: Sequence[Variant], clock: Clock, roof: Roof, seconds: float) -> None:
        self.variants = variants
        self.clock = clock
        self.roof = roof
        self.seconds = seconds
        self.failures: list[str] = []  # errors of our own variants, memory aside
        self._environment = describe_environment(clock.device)

    def run(self, cases: Sequence[Case]) -> Iterator[Row]:
        """Run the cases in order; rows as they come."""
        begin = time.monotonic()
        for done, case in enumerate(cases):
            left = self.seconds - (time.monotonic() - begin)
            if left <= 0 and done > 0:
                reason = f"{NO_TIME_LEFT} {self.seconds:g} seconds"
                yield from (self._failed(case, variant.name, reason) for variant in self.variants)
                continue
            yield from self.run_case(case, left / (len(cases) - done), begin + self.seconds)

    def run_case(self, case: Case, seconds: float, end: float = math.inf) -> list[Row]:
        """One case's rows.

        Args:
            case: to be run.
            seconds: after which no further round begins, once `MIN_ROUNDS` are done.
            end: of the run, by time.monotonic, after which `ROUNDS_IN_HASTE` are enough.
        """
        deadline = time.monotonic() + seconds
        rows: list[Row] = []
        try:
            problem = Problem(case, self.clock.device)
            entries = [entry for variant in self.variants if (entry := self._prepare(variant, problem, rows))]
            roof = self._copy("roof", self.roof.moved_bytes)
            copy = self._copy("copy", max((e.built.num_bytes for e in entries), default=1))
            self._time([*entries, copy, roof], case, deadline, end, rows)
        except Exception as error:  # the tensors themselves: whatever it is, other cases may go well
            reason = self._explain(error)
            known = {row["variant"] for row in rows}
            rows += [self._failed(case, v.name, reason) for v in self.variants if v.name not in known]
            if not is_out_of_memory(error):
                self.failures.append(f"{case}: {reason}")
        finally:
            problem = entries = copy = roof = None  # type: ignore[assignment]
            self._free()
        return rows

    def _prepare(self, variant: Variant, problem: Problem, rows: list[Row]) -> _Entry | None:
        """Build a variant, compare its first step with float64 and take a second one for its memory."""
        try:
            built = variant.build(problem)
            comparison = Comparison(problem, built.grad_dtype, built.shared_dtype)
            built.step()
            error_ulps = comparison.worst_ulps()
            del comparison
            return _Entry(variant.name, built, error_ulps, self.clock.peak_bytes(built.step))
        except Exception as error:
            self._drop(variant.name, problem.case, error, rows)
        built = None  # type: ignore[assignment]
        self._free()
        return None

    def _copy(self, name: str, moved_bytes: int) -> _Entry:
        step, num_bytes = self.roof.copy(moved_bytes)
        return _Entry(name, Built(step, num_bytes, torch.float32, torch.float32))

    def _time(self, entries: list[_Entry], case: Case, deadline: float, end: float, rows: list[Row]) -> None:
        """Sample in rounds, one sample of each in every round, and add the rows."""
        for rounds in range(MAX_ROUNDS):
            now = time.monotonic()
            if (rounds >= MIN_ROUNDS and now > deadline) or (rounds >= ROUNDS_IN_HASTE and now > end):
                break
            for entry in list(entries):
                try:
                    previous = entry.samples[-1] if entry.samples else None
                    entry.samples.append(self.clock.sample(entry.built.step, previous))
                except Exception as error:
                    entries.remove(entry)
                    self._drop(entry.name, case, error, rows)
        roof = next(entry for entry in entries if entry.name == "roof")
        copy_gb_per_s = roof.built.num_bytes / _median(roof) / 1e9
        measured = [
            measured_row(
                case,
                entry.name,
                self._environment,
                entry.built,
                entry.samples,
                error_ulps=entry.error_ulps,
                peak_bytes=entry.peak_bytes,
                copy_gb_per_s=copy_gb_per_s,
            )
            for entry in entries
            if entry is not roof
        ]
        torch_row = next((row for row in measured if row["variant"] == "torch_fused"), None)
        for row in measured:
            if row["variant"] == "copy":
                row.update(grad_dtype=None, state_dtype=None, rounding=None, baseline=None, reason=None)
            else:
                compare_with_torch(row, torch_row)
        rows += measured

    def _drop(self, name: str, case: Case, error: Exception, rows: list[Row]) -> None:
        reason = self._explain(error)
        rows.append(self._failed(case, name, reason))
        is_ours = any(variant.is_ours and variant.name == name for variant in self.variants)
        if is_ours and not isinstance(error, CannotDoError) and not is_out_of_memory(error):
            self.failures.append(f"{case}, {name}: {reason}")

    def _failed(self, case: Case, name: str, reason: str) -> Row:
        return failed_row(case, name, self._environment, reason)

    def _explain(self, error: Exception) -> str:
        if isinstance(error, CannotDoError):
            return str(error)
        first_line = (str(error).strip().splitlines() or [""])[0]
        return f"{'out of memory' if is_out_of_memory(error) else type(error).__name__}: {first_line}"

    def _free(self) -> None:
        gc.collect()
        if self.clock.device.type == "cuda":
            with contextlib.suppress(RuntimeError):  # a device in error: the rows must not be lost with it
                torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Return True for an error about memory; a CPU's allocator and a driver raise a plain RuntimeError."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return any(text in str(error) for text in ("can't allocate memory", "CUDA error: out of memory"))


def _median(entry: _Entry) -> float:
    return quantile([sample.seconds for sample in entry.samples], 0.5)
