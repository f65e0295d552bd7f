"""A checkpoint of GrassAdamW in `torch.optim.AdamW`.

Would catch: states of layers that were never drawn that torch cannot update (memory shared by all elements), or that
it takes for states of a parameter that has been stepped; a run that continues from other moments than were saved; a
file that holds zeros.
"""

import io

import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

import grass
from tests.support import tiny

pytestmark = pytest.mark.plain_only(reason="not about kernels, and slow in the interpreter")

MODES = {
    "in place": {},
    "resident": {"offload": "resident"},
    "streamed": {"offload": "streamed", "buffer_mb": 0.2},
}


def trained(steps, mode=MODES["in place"], **options):
    model = tiny.stack()
    optimizer = grass.GrassAdamW(model, lr=1e-2, config=tiny.config(**mode), **options)
    tiny.train(model, optimizer, 0, steps)
    return model, optimizer


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True), file.getbuffer().nbytes


@pytest.mark.parametrize(
    "path", [{}, {"foreach": True}, {"fused": True}], ids=["for loop", "foreach", "fused"]
)
@pytest.mark.parametrize("steps", [0, 2, 7], ids=["new", "while probing", "trained"])
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_torch_continues(mode, steps, path):
    model, optimizer = trained(steps, mode, **path)  # torch takes the path from the state dict, too
    state, _ = through_a_file(optimizer.state_dict())
    optimizer.release()
    of_torch = torch.optim.AdamW(model.parameters(), lr=1e-2, **path)
    of_torch.load_state_dict(state)
    assert path.items() <= of_torch.param_groups[0].items()
    params = list(model.parameters())
    expected = []
    for index, p in enumerate(params):
        p.grad = torch.full_like(p, 0.1)
        saved = state["state"].get(index) or {
            "step": torch.tensor(0.0), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p),
        }  # fmt: skip
        alone = torch.nn.Parameter(p.detach().clone())
        alone.grad = p.grad.clone()
        one = torch.optim.AdamW([alone], lr=1e-2, **path)
        one.state[alone] = {key: value.clone() for key, value in saved.items()}
        one.step()
        expected.append(alone)
    of_torch.step()
    for p, q in zip(params, expected, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0)
    if steps == 7:
        counters = {int(entry["step"]) for entry in of_torch.state.values()}
        assert 1 in counters  # layers that had never been drawn begin
        assert len(counters) > 1


def test_a_file_has_no_states_that_do_not_exist():
    _, optimizer = trained(0)
    _, empty = through_a_file(optimizer.state_dict())
    _, optimizer = trained(7)
    state, some = through_a_file(optimizer.state_dict())
    own = sum(t.numel() * t.itemsize for entry in optimizer.state.values() for t in entry.values())
    assert any(entry == {} for entry in state["state"].values())
    assert own <= some - empty < 1.5 * own + 20_000


def test_a_checkpoint_library_gets_every_state_as_a_tensor_of_its_own():
    model, optimizer = trained(7)
    states = get_optimizer_state_dict(model, optimizer)["state"]
    names = [name for name, _ in model.named_parameters()]
    assert set(states) == set(names)
    for name, p in model.named_parameters():
        for key in ("exp_avg", "exp_avg_sq"):
            t = states[name][key]
            assert t.shape == p.shape
            assert t.is_contiguous()
            assert t.untyped_storage().nbytes() >= t.numel() * t.itemsize
    fresh = tiny.stack()
    for p in fresh.parameters():
        p.grad = torch.ones_like(p)
    of_torch = torch.optim.AdamW(fresh.parameters(), fused=True)
    of_torch.load_state_dict(
        {
            "state": dict(enumerate(map(states.get, names))),
            "param_groups": of_torch.state_dict()["param_groups"],
        }
    )
    of_torch.step()
