"""``torch.set_default_device`` changes nothing: what is of the host stays there.

Would catch: a tensor of the host (probabilities, permutation, counters of a state dict) made on the default device,
where its generator, its mask or its values are not.

The default device is meta, which stands for a GPU here: what is made there has no values.
"""

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import nn

import grass
from grass.config import GrassConfig
from grass.sampling import SAMPLER_CLASSES


@pytest.fixture(autouse=True)
def _default_device() -> Iterator[None]:
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_adamw(dtype: torch.dtype) -> None:
    p, q = (nn.Parameter(torch.ones(3, dtype=dtype, device="cpu")) for _ in range(2))
    ours = grass.AdamW([p], lr=0.1, max_grad_norm=100.0)
    for step in range(3):
        p.grad = torch.ones_like(p)
        ours.step()
        if step == 1:
            state_dict = copy.deepcopy(ours.state_dict())
            state_dict["state"][0]["step"] = 2  # a number, as earlier versions of torch kept it
            ours.load_state_dict(state_dict)
    assert ours.grad_norm is not None
    assert ours.grad_norm.device.type == "cpu"
    with torch.device("cpu"):
        theirs = torch.optim.AdamW([q], lr=0.1)
        for _ in range(3):
            q.grad = torch.ones_like(q)
            theirs.step()
    torch.testing.assert_close(p, q)


@pytest.mark.parametrize("offload", ["none", "resident", "streamed"])
@pytest.mark.parametrize("sampler", sorted(SAMPLER_CLASSES))
def test_method(sampler: str, offload: str) -> None:
    model = nn.ModuleDict({"blocks": nn.ModuleList(nn.Linear(4, 4, device="cpu") for _ in range(4))})
    config = GrassConfig(
        active_layers=2, probe_steps=2, sample_interval=2, update_interval=4, sampler=sampler, offload=offload,
        buffer_mb=0.25,
    )  # fmt: skip
    optimizer = grass.GrassAdamW(model, lr=0.1, config=config)
    for step in range(8):
        x = torch.ones(2, 4, device="cpu")
        for block in model["blocks"]:
            x = torch.tanh(block(x))
        x.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in (0, 5):
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert optimizer.probabilities.sum().item() == pytest.approx(1)
    assert optimizer.importance.device.type == "cpu"
    copied, _ = copy.deepcopy((optimizer, model))
    assert copied.active_layers == optimizer.active_layers
