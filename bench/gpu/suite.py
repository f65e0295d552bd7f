"""Everything that needs a GPU, in one command: ``make gpu``, or ``python -m bench gpu``.

First the tests, then the benchmarks, the most important first, inside the time given. It runs from the source tree,
installs nothing and needs no network. In the folder of the run:

    environment.json    the card, its driver, versions, the commit
    rows.jsonl          all rows, as they come
    summary.json        the result of each stage, written after each
    STAGE.log           the output of a stage

A stage that reaches its limit is stopped, reported as such, and the others go on. The exit code is 1 if a test failed
or did not come to its end, 2 for wrong usage, otherwise 0.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import re
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.gpu import process
from bench.gpu.process import Ended, RowTail
from bench.gpu.stages import ROOT, Stage, make_stages
from bench.kernels.rows import describe_environment
from grass.cli.values import UsageError, positive
from grass.errors import GrassError

LEAST = 10.0
"""Minimum seconds for a stage to be started; half of the time of a short run."""
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
        "gpu", help="on a machine with a GPU: its tests, then all benchmarks", description=__doc__
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="folder of the run; an earlier run there is replaced [bench/results/CARD]",
    )
    parser.add_argument("--minutes", type=_minutes, default=9.0, metavar="N", help="for the whole run [9]")
    parser.add_argument("--list", action="store_true", help="list the stages, and run nothing")
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")
    parser.set_defaults(run=run)


def _minutes(text: str) -> float:
    if positive(text) >= 24 * 60:
        raise argparse.ArgumentTypeError(f"must be less than a day, not {text}")
    return float(text)


def run(arguments: argparse.Namespace) -> int:
    """Run the suite; 1 if a test failed."""
    device = torch.device("cuda") if torch.cuda.is_available() else None
    card = "gpu" if device is None else describe(device)["gpu"]
    out = (arguments.output or ROOT / "bench" / "results" / _slug(card)).resolve()  # stages run in the root
    if out.exists() and not out.is_dir():
        raise UsageError(f"--output {out} is a file: pass a folder")
    stages = make_stages(out)
    if arguments.list:
        print(_listing(stages, arguments.minutes, as_json=arguments.json))
        return 0
    if device is None:
        raise GrassError("no CUDA or ROCm device here; --list shows what would run")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--output {out} cannot be made: {error.strerror}") from None
    return Suite(out, stages, arguments.minutes, describe(device), as_json=arguments.json).run()


def _slug(name: str) -> str:
    """A card's name as a folder's: nvidia-h100-80gb-hbm3."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _listing(stages: Sequence[Stage], minutes: float, *, as_json: bool) -> str:
    if as_json:
        listed = [
            {"stage": s.name, "command": s.command, "limit": 60 * minutes * s.share, "missing": s.missing}
            for s in stages
        ]
        return json.dumps(listed, indent=1)
    lines = [f"stages, in this order, {minutes:g} minutes in all:"]
    for stage in stages:
        limit = f"at most {60 * minutes * stage.share:.0f} s"
        lines += [
            f"  {stage.name:<12} {stage.about}; {f'left out: {stage.missing}' if stage.missing else limit}",
            f"  {'':<12} {shlex.join(stage.command)}",
        ]
    return "\n".join(lines)


def describe(device: torch.device) -> dict[str, Any]:
    """Return the GPU and the versions of driver and libraries; "unknown" if unavailable."""
    properties = torch.cuda.get_device_properties(device)
    known = describe_environment(device)
    known.update(
        gpu=known["device"],
        gpus=torch.cuda.device_count(),
        memory_bytes=properties.total_memory,
        capability=f"{properties.major}.{properties.minor}",
        toolkit=torch.version.cuda or torch.version.hip,
        platform=platform.platform(),
    )
    for package in _PACKAGES:
        try:
            known[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            known[package] = "not installed"
    return {key: "unknown" if value is None else value for key, value in known.items()}


class Suite:
    """One run of the stages.

    Args:
        out: a folder that exists.
        stages: in their order.
        minutes: for all.
        environment: what is noted of the machine.
        as_json: print the summary in place of a line for each stage.
    """

    def __init__(
        self,
        out: Path,
        stages: Sequence[Stage],
        minutes: float,
        environment: Mapping[str, Any],
        *,
        as_json: bool = False,
    ) -> None:
        self._as_json = as_json
        self._out, self._stages, self._seconds = out, stages, 60 * minutes
        self._rows = out / "rows.jsonl"
        self._results: list[dict[str, Any]] = []
        self._started = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        self._environment = dict(environment)
        self._write("environment.json", self._environment)

    def run(self) -> int:
        """Run all stages, and return the exit code."""
        if self._environment.get("dirty") is True:
            commit = str(self._environment.get("commit"))[:10]
            self._say(f"the tree has uncommitted changes beside {commit}: the rows will say so")
        self._rows.write_text("")
        for stage in self._stages:
            if stage.rows is not None:
                stage.rows.unlink(missing_ok=True)
        self._summarise()
        end = time.monotonic() + self._seconds
        try:
            for stage in self._stages:
                result = self._run_stage(stage, end - time.monotonic())
                self._results.append(result)
                self._summarise()
                reason = f": {result['reason']}" if result["reason"] else ""
                self._say(f"{stage.name:<12} {result['status']:<8} {result['seconds']:>6.1f} s{reason}")
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"stopped; what was measured is in {self._out}") from None
        self._say(f"results are in {self._out}")
        if self._as_json:
            print((self._out / "summary.json").read_text(), end="")
        return 0 if self._passed(("tests", "check")) is not False else 1

    def _run_stage(self, stage: Stage, left: float) -> dict[str, Any]:
        result: dict[str, Any] = {
            "stage": stage.name, "kind": stage.kind, "status": "left out", "reason": stage.missing, "seconds": 0.0,
            "limit": 0.0, "returncode": None, "rows": 0,
        }  # fmt: skip
        if stage.missing:
            return result
        limit = min(stage.share * self._seconds, left)
        result["limit"] = round(limit, 1)
        if limit < min(LEAST, stage.share * self._seconds / 2):
            result["reason"] = "no time left"
            return result
        self._say(f"{stage.name:<12} runs for at most {limit:.0f} s")
        # A benchmark imports, compiles and finishes its last case outside of the time it is told.
        seconds = max(1, int(limit - min(25.0, 0.3 * limit)))
        tail = RowTail(stage.rows, self._rows)
        ended = process.run(
            [part.replace("{seconds}", str(seconds)) for part in stage.command],
            log=self._out / f"{stage.name}.log",
            limit=limit,
            cwd=ROOT,
            environment=_variables(stage),
            rows=tail,
        )
        status, reason = _verdict(stage, ended)
        result.update(
            status=status,
            reason=reason,
            seconds=round(ended.seconds, 1),
            returncode=ended.returncode,
            rows=tail.lines,
        )
        return result

    def _passed(self, kinds: Sequence[str]) -> bool | None:
        """Return if all stages of these kinds that ran passed; None if none ran. A killed check does not count."""
        chosen = [result for result in self._results if result["kind"] in kinds]
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
                "tests_passed": self._passed(("tests", "check")),
                "stages": self._results,
            },
        )

    def _say(self, line: str) -> None:
        if not self._as_json:
            print(line, flush=True)

    def _write(self, name: str, content: dict[str, Any]) -> None:
        (self._out / name).write_text(json.dumps(content, indent=1) + "\n")


def _verdict(stage: Stage, ended: Ended) -> tuple[str, str | None]:
    if ended.killed:
        return "killed", "it reached its limit"
    if ended.returncode == 0:
        return "passed", None
    if stage.kind == "tests" and ended.returncode == _NO_TESTS:
        return "left out", "no test of it can run here; its log says why"
    return "failed", f"exit code {ended.returncode}; see {stage.name}.log"


def _variables(stage: Stage) -> dict[str, str]:
    variables = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    paths = [str(ROOT), *filter(None, [variables.get("PYTHONPATH")])]
    fixed = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    return {**variables, **fixed, **stage.environment}
