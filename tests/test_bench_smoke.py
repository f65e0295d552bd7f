"""Failures these tests catch: a benchmark of pytest-benchmark that no longer runs, or measures a step that is wrong;
one that is skipped though it should run.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent


def test_every_benchmark_runs_at_tiny_size_and_computes_what_it_should():
    # 5,000 parameters are the fewest for the case of 5,000 tensors. Each benchmark asserts its error column.
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "bench", "-q", "--benchmark-disable", "-p", "no:cacheprovider"],
        cwd=ROOT,
        env={**os.environ, "GRASS_BENCH_SIZE": "5000", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    passed, skipped = (re.search(rf"(\d+) {word}", result.stdout) for word in ("passed", "skipped"))
    assert passed is not None
    assert int(passed[1]) >= 100  # 20 cases, 5 variants or more
    assert skipped is None, result.stdout
