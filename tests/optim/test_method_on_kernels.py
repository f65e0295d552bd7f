"""The whole method on the Triton path, in the interpreter: `TRITON_INTERPRET=1 pytest` runs this file.

Failures these tests catch: GrassAdamW that works with torch's CPU path only, norms that differ between the
probe and the update kernel, a probe that launches once a parameter or builds its tables in every step, a
resumed run that takes another path than the one that was saved.
"""

import io

import pytest
import torch
from torch import nn

import grass
import grass_kernels
import grass_kernels.sq_norm
from grass_kernels import _triton

pytestmark = pytest.mark.skipif(
    not _triton.INTERPRETING, reason="needs TRITON_INTERPRET=1: `make interpreter`"
)

CONFIG = grass.GrassConfig(active_layers=1, probe_steps=2, sample_interval=2, update_interval=4)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.linear(x))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def train(model: Model, optimizer: grass.GrassAdamW, first: int, last: int) -> list[tuple[int, ...]]:
    active = []
    for step in range(first, last):
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step)).to(model.head.weight.dtype)
        active.append(optimizer.active_layers)
        model(x).float().square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return active


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_and_torch_take_the_same_run(dtype, monkeypatch):
    launched = []
    launch = _triton.launch

    def spy(kernel, *args, **kwargs):
        launched.append(kernel)
        launch(kernel, *args, **kwargs)

    monkeypatch.setattr(_triton, "launch", spy)
    model = Model().to(dtype)
    optimizer = grass.GrassAdamW(model, lr=1e-2, config=CONFIG)
    active = train(model, optimizer, 0, 8)
    assert launched, "no kernel was launched"

    count = len(launched)
    for module in (grass_kernels, _triton, grass_kernels.sq_norm):
        monkeypatch.setattr(module, "runs_triton", lambda _: False)
    other = Model().to(dtype)
    plain = grass.GrassAdamW(other, lr=1e-2, config=CONFIG)
    assert train(other, plain, 0, 8) == active
    assert len(launched) == count, "torch's path launched a kernel"
    torch.testing.assert_close(optimizer.importance, plain.importance, rtol=1e-5, atol=0)
    # One unit in the last place of the dtype, at weights below 1, where the two paths round apart.
    ulp = torch.finfo(dtype).eps
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=2 * ulp, atol=4 * ulp * 1e-2, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("stop", [1, 3, 4])
def test_resume_on_kernels_is_bit_equal(stop):
    model = Model()
    optimizer = grass.GrassAdamW(model, lr=1e-2, config=CONFIG)
    train(model, optimizer, 0, stop)
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    saved_model, saved_optimizer = torch.load(file, weights_only=True)
    train(model, optimizer, stop, 8)

    resumed = Model()
    again = grass.GrassAdamW(resumed, lr=1e-2, config=CONFIG)
    resumed.load_state_dict(saved_model)
    again.load_state_dict(saved_optimizer)
    train(resumed, again, stop, 8)
    for p, q in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)
    assert torch.equal(optimizer.importance, again.importance)


def test_probe_and_update_measure_a_gradient_with_the_same_bits():
    model = Model()
    optimizer = grass.GrassAdamW(model, lr=0.0, weight_decay=0.0, config=CONFIG)
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    norms = []
    for _ in range(4):  # the same gradients in two probe steps and two that update nothing at lr = 0
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        norms.append(optimizer.layer_grad_norms)
    trained = [norm for norm in norms[2:] if norm.count_nonzero() == 1]
    assert trained
    for norm in trained:
        index = int(norm.nonzero())
        assert norm[index] == norms[0][index]


def test_a_probe_launches_once_a_bucket_and_builds_its_tables_once(monkeypatch):
    launched, built = [], []
    launch, build = _triton.launch, grass_kernels.sq_norm.build_table

    def spy(kernel, *args, **kwargs):
        launched.append(kernel.__name__)
        launch(kernel, *args, **kwargs)

    def count(**arguments):
        built.append(len(arguments["numels"]))
        return build(**arguments)

    monkeypatch.setattr(_triton, "launch", spy)
    monkeypatch.setattr(grass_kernels.sq_norm, "build_table", count)
    model = Model()
    optimizer = grass.GrassAdamW(model, lr=1e-2, config=CONFIG)
    train(model, optimizer, 0, CONFIG.probe_steps)
    assert sorted(built) == [1, 1, 2, 2, 2]  # weight and bias of the head, and three layers
    assert launched == CONFIG.probe_steps * len(built) * ["_layer_sq_norms_kernel", "_sum_layers_kernel"]
