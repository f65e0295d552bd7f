"""Failures these tests catch: an example that does not run, trains nothing, logs nothing, or leaves layers frozen; a
line in docs/integrations.md that its example does not have.
"""

import re
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

import grass

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
PAGE = ROOT / "docs" / "integrations.md"


@pytest.fixture(autouse=True)
def _fresh_state() -> Iterator[None]:
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


@pytest.fixture
def optimizers(monkeypatch: pytest.MonkeyPatch) -> list[grass.GrassAdamW]:
    """All optimizers that are constructed meanwhile."""
    found: list[grass.GrassAdamW] = []
    original = grass.GrassAdamW.__init__

    def construct(self: grass.GrassAdamW, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        found.append(self)

    monkeypatch.setattr(grass.GrassAdamW, "__init__", construct)
    return found


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Run an example as its command line does."""

    def run_example(name: str, *arguments: str) -> None:
        monkeypatch.syspath_prepend(EXAMPLES)
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")

    return run_example


def tensorboard_tags(folder: Path) -> dict[str, list[float]]:
    from tensorboard.backend.event_processing import event_accumulator

    (file,) = folder.rglob("events.out.tfevents.*")
    events = event_accumulator.EventAccumulator(str(file))
    events.Reload()
    return {tag: [e.value for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.mark.filterwarnings("ignore")  # of the libraries
@pytest.mark.parametrize(
    ("name", "needs", "steps"),
    [
        ("plain_loop", None, 30),
        ("accelerate_loop", None, 24),
        ("trainer", "tensorboard", 30),
        ("lora", "tensorboard", 30),
        ("trl_sft", "trl", 30),
        ("trl_dpo", "trl", 20),
        ("trl_grpo", "trl", 12),
        ("lightning_module", "lightning", 30),
    ],
)
def test_example(
    name: str, needs: str | None, steps: int, run: Any, optimizers: list[grass.GrassAdamW], tmp_path: Path
) -> None:
    if needs is not None:
        pytest.importorskip(needs, reason="the example is of it")
    has_log = name.startswith(("trainer", "lora", "trl_", "lightning"))
    run(name, *([str(tmp_path)] if has_log else []))
    (optimizer,) = optimizers
    assert optimizer.step_count == steps
    assert optimizer.phase == "adapt"
    assert optimizer.importance.min() > 0
    assert optimizer.num_refreshes > 1
    assert all(p.requires_grad for group in optimizer.param_groups for p in group["params"]), "not released"
    if name == "lightning_module":
        assert "grass/importance/" in next(tmp_path.rglob("metrics.csv")).read_text()
    elif has_log:
        tags = tensorboard_tags(tmp_path)
        assert tags["train/grass/phase"][0] == 0
        assert tags["train/grass/phase"][-1] == 1
        for layer in optimizer.layers.names:
            assert torch.tensor(tags[f"train/grass/importance/{layer}"]).isfinite().all()


def test_lines_of_the_page_are_in_the_examples() -> None:
    sections = re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)[1:]
    shown = set()
    for section in sections:
        links = re.findall(r"\(\.\./examples/(\w+)\.py\)", section)
        if not links:
            continue
        shown.update(links)
        code = "".join((EXAMPLES / f"{link}.py").read_text() for link in links)
        lines = {line.split("  #")[0].strip() for line in code.splitlines()}
        for block in re.findall(r"^```py\n(.*?)^```$", section, re.DOTALL | re.MULTILINE):
            # `f(..., x=y)` stands for a call over several lines, of which one is `x=y,`
            shortened = re.sub(r"\.\.\., (.*)\)$", r"\n\1,", block, flags=re.MULTILINE)
            assert set(shortened.splitlines()) - lines == set(), section.splitlines()[0]
    assert shown == {path.stem for path in EXAMPLES.glob("*.py")} - {"tiny_model"}


def test_every_metric_is_on_the_page() -> None:
    monitor = (ROOT / "grass" / "integrations" / "monitor.py").read_text()
    keys = set(re.findall(r"``(grass/[\w/]+)``", monitor))
    assert len(keys) == 14
    assert keys <= set(re.findall(r"`(grass/[\w/]+)`", PAGE.read_text()))
