"""Everything that needs a GPU, in one command: ``make gpu``, or ``python -m bench gpu``.

What is most important comes first, each stage has its time, and what it leaves of it goes to those after it. It runs
from the source tree, installs nothing and needs no network. In the folder of the run, written as it goes:

    environment.json    the card, its driver, versions, the commit
    rows.jsonl          all rows
    summary.json        the result of each process
    tests.txt           the output of the tests
    log.txt             the output of all others
    chart.png           size against the share of the copy bandwidth, if matplotlib is installed

A process that reaches its limit is stopped, reported as such, and the others go on. A benchmark that ends badly leaves
a row that says so. The exit code is 1 if a test failed or did not come to its end, 2 for wrong usage, otherwise 0.

Peaks of memory are predicted before the run, with --predict, since that needs no GPU but time.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import re
import shlex
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from bench.gpu import stages as plan
from bench.gpu import training
from bench.gpu.process import LogTail, Process, RowTail
from bench.gpu.rehearsal import rehearsal
from bench.gpu.stages import CHART, PREDICTIONS, ROOT, ROWS, SANITIZER_ERROR, SECONDS, Stage, Task
from bench.kernels.rows import describe_environment
from grass.cli.values import UsageError, positive
from grass.errors import GrassError

FILES = ("environment.json", "rows.jsonl", "summary.json", "tests.txt", "log.txt", "chart.png")
"""All that a run leaves."""
LEAST = 10.0
"""Minimum seconds for a process to be started; half of its time if that is less."""
_POLL = 0.1  # seconds
_NO_TESTS = 5  # pytest's exit code where nothing was chosen, or all files were skipped
_PACKAGES = (
    "numpy",
    "pytest",
    "pytest-benchmark",
    "transformers",
    "accelerate",
    "peft",
    "matplotlib",
    "expecttest",
)


def add_parser(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "gpu", help="on a machine with a GPU: its tests, and all benchmarks", description=__doc__
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="folder of the run; an earlier run there is replaced [bench/results/CARD]",
    )
    parser.add_argument("--minutes", type=_minutes, default=9.0, metavar="X", help="for the whole run [9]")
    parser.add_argument(
        "--predictions",
        type=Path,
        metavar="FILE",
        help="what --predict has written [bench/results/predictions.jsonl, if it is there]",
    )
    parser.add_argument(
        "--predict",
        type=Path,
        nargs="?",
        const=PREDICTIONS,
        metavar="FILE",
        help="predict the peaks of training, and run nothing [bench/results/predictions.jsonl]",
    )
    parser.add_argument(
        "--rehearse", action="store_true", help="run all stages at a tiny size, without a GPU"
    )
    parser.add_argument("--list", action="store_true", help="list the stages, and run nothing")
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")
    parser.set_defaults(run=run)


def _minutes(text: str) -> float:
    if positive(text) >= 24 * 60:
        raise argparse.ArgumentTypeError(f"must be less than a day, not {text}")
    return float(text)


def run(arguments: argparse.Namespace) -> int:
    """Run the suite; 1 if a test failed."""
    if arguments.predict is not None:
        training.write_predictions(arguments.predict, list(plan.METHODS), plan.SEQUENCE)
        return 0
    predictions = arguments.predictions
    if predictions is None:
        predictions = PREDICTIONS if PREDICTIONS.exists() else None
    elif not predictions.is_file():
        raise UsageError(f"--predictions {predictions}: no such file")
    stages = plan.make_stages(predictions and predictions.resolve())  # stages run in the root
    if arguments.list:
        print(_listing(stages, arguments.minutes, as_json=arguments.json))
        return 0
    if arguments.output is not None and arguments.output.exists() and not arguments.output.is_dir():
        raise UsageError(f"--output {arguments.output} is a file: pass a folder")
    if arguments.rehearse and arguments.output is None:
        raise UsageError("--rehearse needs --output: its rows are no results")
    if not (arguments.rehearse or torch.cuda.is_available()):
        raise GrassError("no CUDA or ROCm device here; --list shows what would run, --rehearse tries it")
    known = describe(torch.device("cpu" if arguments.rehearse else "cuda"))
    out = (arguments.output or ROOT / "bench" / "results" / _slug(known["gpu"])).resolve()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--output {out} cannot be made: {error.strerror}") from None
    with tempfile.TemporaryDirectory(prefix="grass-gpu-") as scratch:
        if arguments.rehearse:
            stages = rehearsal(stages, Path(scratch))
        suite = Suite(out, stages, arguments.minutes, known, Path(scratch), as_json=arguments.json)
        return suite.run()


def _slug(name: str) -> str:
    """A card's name as a folder's: nvidia-h100-80gb-hbm3."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _listing(stages: Sequence[Stage], minutes: float, *, as_json: bool) -> str:
    scale = 60 * minutes / sum(stage.seconds for stage in stages)
    if as_json:
        listed = [
            {"stage": s.name, "task": t.name, "command": t.command, "seconds": seconds, "missing": t.missing}
            for s in stages
            for t, seconds in _seconds(s, scale)
        ]
        return json.dumps(listed, indent=1)
    lines = [f"stages, in this order, {minutes:g} minutes in all; what one leaves goes to the next:"]
    for stage in stages:
        lines.append(f"  {stage.name:<12} {stage.about}; {scale * stage.seconds:.0f} s")
        for task, seconds in _seconds(stage, scale):
            what = f"left out: {task.missing}" if task.missing else f"{seconds:.0f} s"
            lines.append(f"  {'':<12} {task.name}, {what}: {shlex.join(task.command)}")
    return "\n".join(lines)


def _seconds(stage: Stage, scale: float) -> Iterator[tuple[Task, float]]:
    """Yield the tasks with the time that is meant for each."""
    total = sum(task.seconds for task in stage.tasks)
    for task in stage.tasks:
        yield task, scale * stage.seconds * (1.0 if stage.parallel else task.seconds / total)


def describe(device: torch.device) -> dict[str, Any]:
    """Return the GPU and the versions of driver and libraries; None if unknown."""
    known = describe_environment(device)
    known.update(
        gpu=known["device"],
        gpus=torch.cuda.device_count(),
        toolkit=torch.version.cuda or torch.version.hip,
        platform=platform.platform(),
        cores=os.cpu_count(),
    )
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        known.update(
            memory_bytes=properties.total_memory, capability=f"{properties.major}.{properties.minor}"
        )
    for package in _PACKAGES:
        try:
            known[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            known[package] = "not installed"
    return known


class _Running:
    """A task that runs, with what it leaves."""

    def __init__(
        self, result: dict[str, Any], task: Task, process: Process, rows: RowTail, log: LogTail
    ) -> None:
        self.result, self.task, self.process = result, task, process
        self._tails = (rows, log)
        self.rows, self.log = rows, log

    def pass_on(self) -> None:
        """Pass on what it has written."""
        for tail in self._tails:
            tail.pass_on()

    def end(self) -> None:
        """Pass on the last of it."""
        for tail in self._tails:
            tail.end()


class Suite:
    """One run of the stages.

    Args:
        out: a folder that exists.
        stages: in their order.
        minutes: for all.
        environment: what is noted of the machine.
        scratch: folder for what is passed on.
        as_json: print the summary in place of a line for each process.
        clock: seconds that pass, by which processes reach their limits.
        cores: processes at a time in a parallel stage; None is the number of cores.
    """

    def __init__(
        self,
        out: Path,
        stages: Sequence[Stage],
        minutes: float,
        environment: Mapping[str, Any],
        scratch: Path,
        *,
        as_json: bool = False,
        clock: Callable[[], float] = time.monotonic,
        cores: int | None = None,
    ) -> None:
        self._out, self._stages, self._seconds = out, stages, 60 * minutes
        self._environment, self._scratch = dict(environment), scratch
        self._as_json, self._clock, self._cores = as_json, clock, cores or os.cpu_count() or 1
        self._results: list[dict[str, Any]] = []
        self._stopped = False
        self._started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")

    def run(self) -> int:
        """Run all stages, and return the exit code."""
        for name in FILES:
            (self._out / name).unlink(missing_ok=True)
        (self._out / "rows.jsonl").touch()
        shown = {key: "unknown" if value is None else value for key, value in self._environment.items()}
        self._write("environment.json", shown)
        if self._environment.get("dirty") is True:
            commit = str(self._environment.get("commit"))[:10]
            self._say(f"the tree has uncommitted changes beside {commit}: the rows will say so")
        self._summarise()
        scale = self._seconds / sum(stage.seconds for stage in self._stages)
        end = self._clock()
        try:
            with self._heeding_signals():
                for stage in self._stages:
                    start, end = end, end + scale * stage.seconds
                    self._run_stage(stage, start, scale)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"stopped; what was measured is in {self._out}") from None
        self._say(f"results are in {self._out}")
        if self._as_json:
            print((self._out / "summary.json").read_text(), end="")
        return 0 if self._passed() is not False else 1

    @contextmanager
    def _heeding_signals(self) -> Iterator[None]:
        """Stop soon at Ctrl-C and at SIGTERM, but not while a process is being started: it would be left behind."""

        def stop(number: int, frame: object) -> None:
            self._stopped = True

        before = {
            number: signal.signal(number, stop)
            for number in (signal.SIGINT, signal.SIGTERM)
            if signal.getsignal(number) != signal.SIG_IGN
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _run_stage(self, stage: Stage, start: float, scale: float) -> None:
        """Run the tasks of a stage, each to its end or to that of its share of the time.

        Args:
            stage: stage to run.
            start: when it should have begun.
            scale: seconds of the run by seconds of the stages.
        """
        waiting: list[tuple[Task, float, float]] = []
        end = start
        for task, seconds in _seconds(stage, scale):
            end = start + seconds if stage.parallel else end + seconds
            waiting.append((task, seconds, end))
        running: list[_Running] = []
        try:
            while waiting or running:
                if self._stopped:
                    raise KeyboardInterrupt
                while waiting and len(running) < (self._cores if stage.parallel else 1):
                    started = self._start(stage, *waiting.pop(0))
                    if started is not None:
                        running.append(started)
                for one in list(running):
                    one.pass_on()
                    if one.process.has_ended():
                        running.remove(one)
                        self._end(stage, one)
                if running:
                    time.sleep(_POLL)
        finally:
            for one in running:  # the run is being stopped
                one.process.stop()
                self._end(stage, one, stopped=True)

    def _start(self, stage: Stage, task: Task, seconds: float, end: float) -> _Running | None:
        left = end - self._clock()
        result: dict[str, Any] = {
            "stage": stage.name, "task": task.name, "kind": stage.kind, "status": "left out", "reason": task.missing,
            "seconds": 0.0, "limit": round(max(0.0, left), 1), "returncode": None, "rows": 0,
        }  # fmt: skip
        if task.missing is None and left < (min(LEAST, seconds / 2) if seconds else LEAST):
            result["reason"] = "no time left"
        if result["reason"] is not None:
            self._note(result)
            return None
        self._say(f"{task.name:<30} runs for at most {left:.0f} s")
        # A benchmark imports, compiles and finishes its last case outside of the time it is told.
        told = max(1, int(left - min(25.0, 0.3 * left)))
        rows, log = (self._scratch / f"{task.name}.{what}" for what in ("jsonl", "log"))
        values = {SECONDS: str(told), ROWS: str(rows), CHART: str(self._out / "chart.png")}
        try:
            process = Process(
                [values.get(part, part) for part in task.command],
                log=log,
                cwd=ROOT,
                environment=_variables(stage),
                deadline=end,
                clock=self._clock,
            )
        except OSError as error:
            result.update(status="failed", reason=f"cannot be started: {error.strerror}")
            self._note(result)
            return None
        text = self._out / ("tests.txt" if stage.kind == "tests" else "log.txt")
        return _Running(
            result, task, process, RowTail(rows, self._out / "rows.jsonl"), LogTail(log, text, task.name)
        )

    def _end(self, stage: Stage, one: _Running, *, stopped: bool = False) -> None:
        one.end()
        code = one.process.returncode
        status, reason = (
            ("killed", "the run was stopped") if stopped else _verdict(stage, one.process.killed, code)
        )
        if status in ("failed", "left out") and one.log.last_line:
            reason = f"{reason}: {one.log.last_line[:300]}"
        one.result.update(
            status=status,
            reason=reason,
            seconds=round(one.process.seconds, 1),
            returncode=code,
            rows=one.rows.lines,
        )
        if stage.kind == "bench" and status != "passed":
            self._add_row(one)
        self._note(one.result)

    def _add_row(self, one: _Running) -> None:
        """Add the row of a benchmark that ended badly."""
        identity = ("device", "driver", "torch", "triton", "python", "commit", "dirty")
        row = {
            "suite": "run",
            "task": one.task.name,
            **one.task.row,
            "measured": False,
            "reason": f"{one.result['status']}: {one.result['reason']}",
            **{key: self._environment.get(key) for key in identity},
        }
        with (self._out / "rows.jsonl").open("a", encoding="utf-8") as rows:
            rows.write(json.dumps(row) + "\n")

    def _note(self, result: dict[str, Any]) -> None:
        self._results.append(result)
        self._summarise()
        reason = f": {result['reason']}" if result["reason"] else ""
        self._say(f"{result['task']:<30} {result['status']:<8} {result['seconds']:>6.1f} s{reason}")

    def _passed(self) -> bool | None:
        """Return if all tests and checks that ran passed; None if none ran. A killed check does not count."""
        chosen = [result for result in self._results if result["kind"] != "bench"]
        bad = [
            r for r in chosen if r["status"] == "failed" or (r["status"] == "killed" and r["kind"] == "tests")
        ]
        if bad:
            return False
        return True if any(result["status"] == "passed" for result in chosen) else None

    def _summarise(self) -> None:
        self._write(
            "summary.json",
            {
                "started": self._started,
                "minutes": self._seconds / 60,
                "tests_passed": self._passed(),
                "tasks": self._results,
            },
        )

    def _say(self, line: str) -> None:
        if not self._as_json:
            print(line, flush=True)

    def _write(self, name: str, content: dict[str, Any]) -> None:
        (self._out / name).write_text(json.dumps(content, indent=1) + "\n")


def _verdict(stage: Stage, killed: bool, code: int) -> tuple[str, str | None]:
    if killed:
        return "killed", "it reached its limit"
    if code == 0:
        return "passed", None
    if stage.kind == "tests" and code == _NO_TESTS:
        return "left out", "no test of it can run here; its output says why"
    if stage.kind == "sanitizer" and code != SANITIZER_ERROR:
        return "left out", f"it did not come to its end, exit code {code}"
    return "failed", f"exit code {code}"


def _variables(stage: Stage) -> dict[str, str]:
    variables = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    paths = [str(ROOT), *filter(None, [variables.get("PYTHONPATH")])]
    fixed = {
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",  # a crash shows where
        "HF_HUB_OFFLINE": "1",
    }
    return {**variables, **fixed, **stage.environment}
