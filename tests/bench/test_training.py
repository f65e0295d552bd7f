"""The 7B's stage, on a model that fits anywhere.

Would catch: a method that cannot be built or cannot step, a model whose buffers are what memory happened to hold
(rotary frequencies would be noise, and losses NaN), a row without what figures are read from.
"""

import json

import pytest
import torch

from bench.gpu import training
from bench.gpu.figures import Rows, figures
from grass.plan.losses import loss_of
from grass.plan.models import build
from grass.plan.prediction import METHODS, Case
from tests.support.tiny import llama

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def case(tmp_path_factory) -> Case:
    folder = tmp_path_factory.mktemp("tiny")
    llama(layers=4).config.save_pretrained(folder)
    return Case(str(folder), batch=2, seq=8, dtype=torch.float32, loss="full", buffer_mb=1.0, active_layers=1)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains(case, name):
    trained = training.make(name, case, CPU)
    ids = torch.randint(0, 32, (2, 8))
    before = [p.detach().clone() for p in trained.model.parameters()]
    for _ in range(3):
        loss = loss_of(trained.model, ids, case.loss)
        assert loss.isfinite()
        loss.backward()
        trained.optimizer.step()
        trained.optimizer.zero_grad()
    moved = any(not torch.equal(p, q) for p, q in zip(trained.model.parameters(), before, strict=True))
    assert moved != name.endswith("probing")


def test_buffers_have_their_values(case):
    model = training.materialise(build(case.model, case.dtype), CPU)
    expected = llama(layers=4)
    found = dict(model.named_buffers())
    assert found.keys() == dict(expected.named_buffers()).keys()
    for name, buffer in expected.named_buffers():
        torch.testing.assert_close(found[name], buffer)


def test_rows_are_predicted_without_a_device(case, tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    arguments = ["--predict", "--model", case.model, "--batch", "2", "--seq", "8", "--out", str(out)]
    assert training.main([*arguments, "--methods", "full", "grass-streamed"]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["method"] for row in rows] == ["full", "grass-streamed"]
    assert all(row["suite"] == "training" and not row["measured"] for row in rows)
    assert all(row["predicted_peak_gib"] > 0 for row in rows)
    assert "not measured" in capsys.readouterr().out


def test_figures_are_read_from_rows():
    row = {"suite": "training", "method": "grass-streamed-fused", "seq": 1024, "peak_gib": 14.0}
    row.update(predicted_peak_gib=14.3, tokens_per_second=5000.0)
    read = {f.name: f.read(Rows([row])) for f in figures()}
    found = read["grass-streamed-fused: peak by the predicted one"]
    assert found is not None
    assert found.passed
    missed = {**row, "peak_gib": 16.0}
    read = {f.name: f.read(Rows([missed])) for f in figures()}
    assert not read["grass-streamed-fused: peak by the predicted one"].passed
