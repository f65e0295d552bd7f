"""The 7B's stage, on a model that fits anywhere.

Would catch: a method that cannot be built or cannot step, a loss that is a stand-in for one, a model whose buffers are
what memory happened to hold (rotary frequencies would be noise, and losses NaN), a failed method that ends the others,
a prediction of another loss, length or method beside what was measured.
"""

import json

import pytest
import torch

from bench.__main__ import main
from bench.gpu import training
from grass.plan.models import build
from grass.plan.prediction import METHODS, Case
from tests.support.tiny import llama

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def case(tmp_path_factory) -> Case:
    folder = tmp_path_factory.mktemp("tiny")
    llama(layers=4, vocab_size=1000).config.save_pretrained(folder)
    return Case(str(folder), batch=2, seq=8, dtype=torch.float32, loss="full", buffer_mb=1.0, active_layers=1)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains(case, name):
    trained = training.make(name, case, CPU)
    ids = torch.randint(0, 32, (2, 8))
    before = [p.detach().clone() for p in trained.model.parameters()]
    for _ in range(3):
        loss = training.loss_of(trained.model, ids, case.loss)
        assert loss.isfinite()
        loss.backward()
        trained.optimizer.step()
        trained.optimizer.zero_grad()
    moved = any(not torch.equal(p, q) for p, q in zip(trained.model.parameters(), before, strict=True))
    assert moved != name.endswith("probing")


@pytest.mark.skipif(not training._chunks(), reason="needs torch 2.13")
def test_both_losses_are_the_model_s(case):
    model = training.make("full", case, CPU).model
    ids = torch.randint(0, 32, (2, 8))
    full, chunked = (training.loss_of(model, ids, kind) for kind in ("full", "chunked"))
    torch.testing.assert_close(full, chunked)


def test_buffers_have_their_values(case):
    model = training.materialise(build(case.model, case.dtype), CPU)
    expected = llama(layers=4, vocab_size=1000)
    found = dict(model.named_buffers())
    assert found.keys() == dict(expected.named_buffers()).keys()
    for name, buffer in expected.named_buffers():
        torch.testing.assert_close(found[name], buffer)


def test_a_method_that_fails_is_a_row_and_the_next_is_measured(case, tmp_path, monkeypatch, capsys):
    make = training.make

    def failing(name, *others):
        if name == "grass":
            raise RuntimeError("CUDA error: an illegal memory access\nand more of it")
        return make(name, *others)

    monkeypatch.setattr(training, "make", failing)
    predictions = tmp_path / "predictions.jsonl"
    training.write_predictions(predictions, ["full", "lisa"], 8, case.model, 2)
    arguments = [
        "training",
        "--device",
        "cpu",
        "--model",
        case.model,
        "--batch",
        "2",
        "--seq",
        "8",
        "16",
        "--json",
    ]
    arguments += ["--methods", "grass", "full", "--predictions", str(predictions)]
    assert main(arguments) == 1
    rows = json.loads(capsys.readouterr().out)
    keys = ("method", "seq", "measured", "reason")
    assert [tuple(row.get(key) for key in keys) for row in rows] == [
        (method, seq, measured, reason)
        for seq in (8, 16)
        for method, measured, reason in (
            ("grass", False, "RuntimeError: CUDA error: an illegal memory access"),
            ("full", True, None),
        )
    ]
    loss = rows[0]["loss"]
    written = [json.loads(line) for line in predictions.read_text().splitlines()]
    (full,) = (row["peak_gib"] for row in written if (row["method"], row["loss"]) == ("full", loss))
    assert [row["predicted_peak_gib"] for row in rows] == [None, full, None, None]
