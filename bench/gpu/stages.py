"""The stages of the suite, the most important first."""

import importlib.util
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent

TEST_FILES = (  # the most important first
    "tests/gpu/test_mixtures.py",
    "tests/gpu/test_no_waiting.py",
    "tests/gpu/test_graphs.py",
    "tests/gpu/test_streams.py",
    "tests/gpu/test_optimizer_on_device.py",
    "tests/gpu/test_offload.py",
)
SANITIZER_ERROR = 86
"""Exit code of compute-sanitizer if it has found an error."""


@dataclass(frozen=True)
class Stage:
    """Something to run.

    Args:
        name: name of its log, and in the summary.
        about: a short description.
        kind: "tests", which must finish and pass; "check", which must not fail; or "bench".
        share: maximum share of the total time.
        command: command line; "{seconds}" is replaced by the time for a benchmark.
        rows: file that it writes rows to.
        environment: additional environment variables.
        missing: reason why it cannot run here, or None.
    """

    name: str
    about: str
    kind: str
    share: float
    command: tuple[str, ...]
    rows: Path | None = None
    environment: dict[str, str] = field(default_factory=dict)
    missing: str | None = None


def make_stages(out: Path) -> list[Stage]:
    """Return all stages.

    Args:
        out: folder of their output.
    """
    return [*_tests(out), *_sanitizer(), *_benchmarks(out)]


def _pytest(out: Path, name: str, *arguments: str) -> tuple[str, ...]:
    # Verbose, so that the log of a stage that was killed tells how far it came.
    options = ("-v", "-p", "no:cacheprovider", "--durations=10", f"--junitxml={out / name}.xml")
    return (sys.executable, "-m", "pytest", *arguments, *options)


def _tests(out: Path) -> list[Stage]:
    deterministic = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    return [
        Stage(
            "tests",
            "every mixture, CUDA graphs, streams, no waiting, GradScaler, memory",
            "tests",
            0.35,
            _pytest(out, "tests", *TEST_FILES),
            environment=deterministic,
        ),
        Stage(
            "tests-torch",
            "torch's own optimizer tests, on the device",
            "tests",
            0.1,
            _pytest(out, "tests-torch", "tests/optim/test_torch_contract.py", "-k", "cuda"),
            environment=deterministic,
            missing=_not_installed("expecttest"),
        ),
    ]


def _sanitizer() -> list[Stage]:
    tool = find_sanitizer()
    options = ("--error-exitcode", str(SANITIZER_ERROR), "--target-processes", "application-only")
    return [
        Stage(
            name,
            f"compute-sanitizer {name} over a few steps of every mixture",
            "check",
            0.08,
            # Errors of CUDA calls that torch handles are not reported.
            (
                tool or "compute-sanitizer", "--tool", name, *options, "--report-api-errors", "no",
                sys.executable, "-m", "bench.gpu.sanitized",
            ),
            environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            missing=None if tool else "compute-sanitizer is not installed",
        )
        for name in ("memcheck", "racecheck")
    ]  # fmt: skip


def find_sanitizer(places: Sequence[str] = ("/usr/local/cuda/bin", "/opt/cuda/bin")) -> str | None:
    """Return the path of compute-sanitizer, which may not be on the PATH."""
    found = shutil.which("compute-sanitizer")
    for place in places:
        found = found or shutil.which("compute-sanitizer", path=place)
    return found


def _benchmarks(out: Path) -> list[Stage]:
    def bench(name: str, *arguments: str) -> tuple[str, ...]:
        return (sys.executable, "-m", "bench", name, *arguments, "--out", str(files[name]))

    names = ("figures", "training", "offload", "host", "kernels")
    files = {name: out / f"{name}.jsonl" for name in names}
    chart = () if _not_installed("matplotlib") else ("--plot", str(out / "chart.png"))
    return [
        Stage(
            "figures",
            "the cases that the promised figures are read from",
            "bench",
            0.25,
            bench("figures", "--seconds", "{seconds}"),
            files["figures"],
        ),
        Stage(
            "training",
            "a 7B, method by method: peak and speed, beside what was predicted",
            "bench",
            0.35,
            bench("training", "--seconds", "{seconds}"),
            files["training"],
            missing=_not_installed("transformers"),
        ),
        Stage(
            "offload",
            "states through the ring: measured beside simulated; the bus each way and both ways",
            "bench",
            0.15,
            bench("offload"),
            files["offload"],
        ),
        Stage(
            "host",
            "the host's time of a step, and steps on the CPU",
            "bench",
            0.1,
            bench("host", "--seconds", "20"),
            files["host"],
        ),
        Stage(
            "kernels",
            "all cases and all optimizers that are installed",
            "bench",
            1.0,
            bench("kernels", "--seconds", "{seconds}", *chart),
            files["kernels"],
        ),
    ]


def _not_installed(module: str) -> str | None:
    return None if importlib.util.find_spec(module) else f"{module} is not installed"
