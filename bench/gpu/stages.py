"""The stages of the suite in their order, what each may take of the time, and the processes of each.

A process that crashes, hangs or leaves the device in error spoils its own results only, so files of tests, methods of
training and dtypes of the figures have one each.
"""

import importlib.util
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.gpu import measure
from bench.gpu.figures import PARTS
from bench.gpu.measure import TRIED

ROOT = Path(__file__).resolve().parent.parent.parent
PREDICTIONS = ROOT / "bench" / "results" / "predictions.jsonl"

TEST_FILES = (  # the most important first
    "tests/gpu/test_mixtures.py",
    "tests/gpu/test_rounding.py",
    "tests/gpu/test_no_waiting.py",
    "tests/gpu/test_graphs.py",
    "tests/gpu/test_streams.py",
    "tests/gpu/test_optimizer_on_device.py",
    "tests/gpu/test_offload.py",
)
METHODS = {
    "grass-streamed-fused": 54.0,  # it also fills the caches of files
    "grass-streamed": 32.0,
    "grass-resident": 28.0,
    "grass": 28.0,
    "full": 28.0,
    "lisa": 0.0,
    "lora-r128": 0.0,
}
"""Methods of training in their order, with the seconds of each; 0 takes what the others leave."""
OFFLOADS = {
    "offload-default": (),
    "offload-2-buffers": ("--buffer-count", "2"),
    "offload-normal-priority": ("--normal-priority",),
}
"""Runs of the pipeline, and their options: as by default, and what is compared with it."""
SEQUENCE = 1024
WORKERS = "4"
SANITIZER_ERROR = 86
"""Exit code of compute-sanitizer if it has found an error."""
SECONDS, ROWS, CHART = "{seconds}", "{rows}", "{chart}"
"""In a command, replaced by the time for a benchmark, the file for its rows, and that for a chart."""


@dataclass(frozen=True)
class Task:
    """A process of a stage.

    Args:
        name: name in the summary, and of its output.
        command: command line, with `SECONDS`, `ROWS` and `CHART`.
        seconds: share of the stage, relative to that of its other tasks; 0 takes what they leave.
        row: columns of the row that tells of a failure, where its rows have a suite of their own.
        missing: reason why it cannot run here, or None.
    """

    name: str
    command: tuple[str, ...]
    seconds: float = 1.0
    row: dict[str, object] = field(default_factory=dict)
    missing: str | None = None


@dataclass(frozen=True)
class Stage:
    """Something to run.

    Args:
        name: name in the summary.
        about: a short description.
        kind: "tests", which must finish and pass; "check", which must not fail; "sanitizer", which must not find an
            error; or "bench".
        seconds: share of the run, relative to that of the other stages. What it leaves goes to those after it.
        tasks: processes, the most important first.
        parallel: run as many at a time as there are cores, each for as long as the stage may take.
        environment: additional environment variables.
    """

    name: str
    about: str
    kind: str
    seconds: float
    tasks: tuple[Task, ...]
    parallel: bool = False
    environment: dict[str, str] = field(default_factory=dict)


def make_stages(predictions: Path | None = None) -> list[Stage]:
    """Return all stages.

    Args:
        predictions: file of predicted peaks; None if there is none.
    """
    return [
        Stage(
            "smoke",
            "a step of every mixture beside the reference; the link, the device's memory, pinning",
            "check",
            20.0,
            (Task("smoke", _bench("smoke")),),
        ),
        Stage(
            "figures",
            "the cases that the promised figures are read from",
            "bench",
            110.0,
            tuple(
                Task(f"figures-{part}", _bench("figures", "--part", part, "--seconds", SECONDS), seconds)
                for part, seconds in zip((*PARTS, TRIED), (44.0, 33.0, 33.0, 44.0), strict=True)
                if part != TRIED or measure.CANDIDATES
            ),
        ),
        Stage(
            "tests",
            "every mixture, CUDA graphs, streams, no waiting, GradScaler, offload; torch's own optimizer tests",
            "tests",
            100.0,
            _tests(),
            parallel=True,
            environment={
                "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
                "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # plugins of the machine may warn, and warnings are errors
            },
        ),
        Stage(
            "offload",
            "states through the ring, beside matrix products and the simulation: the defaults, two buffers, and "
            "updates at normal priority",
            "bench",
            66.0,
            tuple(
                Task(name, _bench("offload", *options), row={"suite": "offload"})
                for name, options in OFFLOADS.items()
            ),
        ),
        Stage(
            "training",
            "a 7B, method by method: peak and speed, beside what was predicted",
            "bench",
            170.0,
            tuple(_training(method, seconds, predictions) for method, seconds in METHODS.items()),
        ),
        _sanitizer(),
        Stage(
            "kernels",
            "all cases and all optimizers that are installed",
            "bench",
            34.0,
            (Task("kernels", _bench("kernels", "--seconds", SECONDS, *_chart())),),
        ),
    ]


def _bench(*arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "bench", *arguments, "--out", ROWS)


def _tests() -> tuple[Task, ...]:
    # Verbose, so that the output of a file that was killed tells how far it came; where it hung, the stacks of its
    # threads do. Warnings of the machine's versions are shown, and fail no test.
    options = (
        "-v",
        "-W",
        "default",
        "-p",
        "no:cacheprovider",
        "--durations=5",
        "-o",
        "faulthandler_timeout=45",
    )
    pytest = (sys.executable, "-m", "pytest", *options)
    files = [
        Task(f"tests-{Path(path).stem.removeprefix('test_')}", (*pytest, *_workers(path), path))
        for path in TEST_FILES
    ]
    contract = (*pytest, "tests/optim/test_torch_contract.py", "-k", "cuda")
    return (*files, Task("tests-torch", contract, missing=_not_installed("expecttest")))


def _workers(path: str) -> tuple[str, ...]:
    """Return the options that divide the file which compiles most among workers, where xdist is installed."""
    divided = path == TEST_FILES[0] and not _not_installed("xdist")
    return ("-p", "xdist.plugin", "-n", WORKERS) if divided else ()


def _training(method: str, seconds: float, predictions: Path | None) -> Task:
    given = () if predictions is None else ("--predictions", str(predictions))
    return Task(
        f"training-{method}",
        _bench("training", "--methods", method, "--seq", str(SEQUENCE), *given),
        seconds,
        row={"suite": "training", "method": method, "seq": SEQUENCE},
        missing=_not_installed("transformers") or (_not_installed("peft") if "lora" in method else None),
    )


def _sanitizer() -> Stage:
    tool = find_sanitizer()
    # Errors of CUDA calls that torch handles are not reported.
    options = (
        "--error-exitcode", str(SANITIZER_ERROR), "--target-processes", "application-only", "--report-api-errors", "no",
    )  # fmt: skip
    program = (sys.executable, "-m", "bench.gpu.sanitized")
    return Stage(
        "sanitizer",
        "compute-sanitizer over a few steps of every mixture",
        "sanitizer",
        40.0,
        tuple(
            Task(
                name,
                (tool or "compute-sanitizer", "--tool", name, *options, *program),
                missing=None if tool else "compute-sanitizer is not installed",
            )
            for name in ("memcheck", "racecheck")
        ),
        environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    )


def find_sanitizer(places: Sequence[str] = ("/usr/local/cuda/bin", "/opt/cuda/bin")) -> str | None:
    """Return the path of compute-sanitizer, which may not be on the PATH."""
    found = shutil.which("compute-sanitizer")
    for place in places:
        found = found or shutil.which("compute-sanitizer", path=place)
    return found


def _chart() -> tuple[str, ...]:
    return () if _not_installed("matplotlib") else ("--plot", CHART)


def _not_installed(module: str) -> str | None:
    return None if importlib.util.find_spec(module) else f"{module} is not installed"
