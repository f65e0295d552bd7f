"""Failures these tests catch: an example that does not run as its first line says, or does not resume on another number
of ranks.
"""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.plain_only(
    reason="processes with the interpreter are slow, and shards are ordinary tensors"
)

ROOT = Path(__file__).parents[2]


def launch(ranks: int, folder: Path) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    process = subprocess.Popen(
        [*command, "examples/fsdp2.py", str(folder)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(timeout=240)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # ranks outlive their launcher
    assert process.returncode == 0, errors[-2000:]
    return output


def test_the_example_trains_and_resumes_on_another_number_of_ranks(tmp_path):
    first = launch(2, tmp_path)
    assert "step 0: " in first
    assert "step 20: " in first
    again = launch(1, tmp_path)  # from the checkpoint of step 12
    assert "step 0: " not in again
    draws = [line for line in (first + again).splitlines() if line.startswith("draws of each layer")]
    assert len(draws) == 2
    assert draws[0] == draws[1]
