"""The 7B's stage, on a model that fits anywhere.

Would catch: a method that cannot be built or cannot step, a model whose buffers are what memory happened to hold
(rotary frequencies would be noise, and losses NaN).
"""

import pytest
import torch

from bench.gpu import training
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
