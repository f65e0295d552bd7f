"""Parameters with exact weights that others write to, in whatever way.

Would catch: a NaN where torch has none, since a remainder wraps beside a zero or an infinity; a written value that the
next step starts from more than half a bfloat16 unit away; a way of writing, a mode or a copy in which that is not so; a
look at the state that changes it; views of one flat buffer that are refused, or that train unlike tensors of their own.

Runs in both passes: with ``TRITON_INTERPRET=1`` steps take the kernels.
"""

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import grass
from grass_kernels import _triton
from tests.support import tiny
from tests.support.twins import BF16, F32, KINDS, Model, normal

LARGEST = torch.finfo(BF16).max
SMALLEST_NORMAL = torch.finfo(BF16).tiny
DENORMAL = 2.0**-133
VALUES = (
    0.0, -0.0, torch.inf, -torch.inf, torch.nan, LARGEST, -LARGEST, DENORMAL, -DENORMAL, 127 * DENORMAL,
    SMALLEST_NORMAL, -SMALLEST_NORMAL, 1.0, -1.0, 0.75, -301.0,
)  # fmt: skip
COLUMNS = 48
WRITTEN = torch.tensor(VALUES).to(BF16)[:, None].expand(len(VALUES), COLUMNS)
HYPER = {"lr": 1e-3, "weight_decay": 0.1}


class Pairs(nn.Module):
    """A weight of one row a value that will be written, and a bias that nobody writes to. `flat` holds both."""

    def __init__(self) -> None:
        super().__init__()
        self.flat = normal(WRITTEN.numel() + COLUMNS, seed=0).to(BF16)
        self.weight, self.bias = (nn.Parameter(torch.empty(0, dtype=BF16)) for _ in range(2))
        self.weight.data = self.flat[: WRITTEN.numel()].view(WRITTEN.shape)
        self.bias.data = self.flat[WRITTEN.numel() :]


def set_grads(params: list[nn.Parameter], step: int) -> None:
    for i, p in enumerate(params):
        p.grad = normal(*p.shape, seed=100 * (step + 1) + i).to(BF16).to(p.dtype)


def joined(p: Tensor, state: dict[str, Tensor]) -> Tensor:
    """The fp32 values that a step has left in two halves."""
    bits = p.detach().view(torch.int16).to(torch.int64) << 16
    return (bits + state["remainder"].to(torch.int64)).to(torch.int32).view(F32)


def half_unit(t: Tensor) -> Tensor:
    """Half of the distance from a bfloat16 to the next one farther from zero, in float64."""
    exponent = ((t.view(torch.int16).to(torch.int64) >> 7) & 0xFF).clamp(min=1)
    return torch.ldexp(torch.ones(t.shape, dtype=torch.float64), exponent - 127 - 8)


def assert_near(found: Tensor, expected: Tensor, written: Tensor) -> None:
    """Within half a unit of what was written, beside what float32 loses."""
    assert torch.equal(found.isnan(), expected.isnan())
    found, expected = found.double(), expected.double()
    infinite = expected.isinf()
    assert torch.equal(found[infinite], expected[infinite])
    finite = expected.isfinite() & written.isfinite()
    allowed = half_unit(written) * (1 + 1e-6) + 2e-6 * expected.abs() + 1e-5 * HYPER["lr"]
    assert ((found - expected).abs() <= allowed)[finite].all()


def in_place(model: Pairs, values: Tensor) -> None:
    with torch.no_grad():
        model.weight.copy_(values)


def by_rows(model: Pairs, values: Tensor) -> None:
    with torch.no_grad():
        for row, value in enumerate(values):
            model.weight[row] = value


def through_data(model: Pairs, values: Tensor) -> None:
    model.weight.data[...] = values


def fill_data(model: Pairs, values: Tensor) -> None:
    for row, value in enumerate(values[:, 0].tolist()):
        model.weight.data[row].fill_(value)


def copy_to_data(model: Pairs, values: Tensor) -> None:
    model.weight.data.copy_(values)


def copy_to_detached(model: Pairs, values: Tensor) -> None:
    model.weight.detach().copy_(values)


def new_data(model: Pairs, values: Tensor) -> None:
    model.weight.data = values.clone()


def load(model: Pairs, values: Tensor) -> None:
    model.load_state_dict({"weight": values, "bias": model.bias.detach().clone()})


def buffer_below(model: Pairs, values: Tensor) -> None:
    model.flat[: values.numel()] = values.flatten()


def bits_below(model: Pairs, values: Tensor) -> None:
    """Through an array of another library on the same memory."""
    model.weight.data.view(torch.int16).numpy()[...] = values.contiguous().view(torch.int16).numpy()


def from_a_vector(model: Pairs, values: Tensor) -> None:
    """Parameters become views of the vector."""
    nn.utils.vector_to_parameters(torch.cat([values.flatten(), model.bias.detach()]), model.parameters())


def swapped_with_an_average(model: Pairs, values: Tensor) -> None:
    average = values.clone()
    model.weight.data, average = average, model.weight.data


WAYS = [
    in_place, by_rows, through_data, fill_data, copy_to_data, copy_to_detached, new_data, load, buffer_below,
    bits_below, from_a_vector, swapped_with_an_average,
]  # fmt: skip


def trained(steps: int = 3, **options) -> tuple[Pairs, grass.AdamW]:
    model = Pairs()
    optimizer = grass.AdamW(model.parameters(), **HYPER, master_weights=True, **options)
    for step in range(steps):
        set_grads(list(model.parameters()), step)
        optimizer.step()
    remainder = optimizer.state[model.weight]["remainder"]
    assert (remainder > 0).any(1).all(), "stale remainders of both signs in every row"
    assert (remainder < 0).any(1).all()
    return model, optimizer


def oracle(model: Pairs, state: dict[str, Tensor], **options) -> tuple[nn.Parameter, torch.optim.AdamW]:
    """torch's optimizer on the written value in float32, with our moments and counter."""
    twin = nn.Parameter(model.weight.detach().float())
    optimizer = torch.optim.AdamW([twin], **HYPER, **options, foreach=False)
    optimizer.state[twin] = {key: t.clone() for key, t in state.items() if key != "remainder"}
    return twin, optimizer


@pytest.mark.parametrize("without_gradient", [False, True], ids=["at once", "after a step without it"])
@pytest.mark.parametrize("write", WAYS)
def test_a_step_starts_from_what_was_written(write: Callable, without_gradient: bool):
    model, optimizer = trained()
    write(model, WRITTEN)
    torch.testing.assert_close(model.weight.detach(), WRITTEN, rtol=0, atol=0, equal_nan=True)
    if without_gradient:
        model.weight.grad, model.bias.grad = None, torch.ones_like(model.bias)
        optimizer.step()
    twin, reference = oracle(model, optimizer.state[model.weight])
    bias = joined(model.bias, optimizer.state[model.bias])
    for step in range(3, 6):
        set_grads([model.weight], step)
        model.bias.grad, twin.grad = None, model.weight.grad.float()
        optimizer.step()
        reference.step()
        state = optimizer.state[model.weight]
        assert_near(joined(model.weight, state), twin.detach(), WRITTEN)
        assert torch.equal(model.weight.isnan(), twin.isnan()), "a NaN that torch does not have"
        torch.testing.assert_close(state["exp_avg"], reference.state[twin]["exp_avg"], rtol=1e-5, atol=1e-6)
    assert torch.equal(joined(model.bias, optimizer.state[model.bias]), bias)


@pytest.mark.parametrize(
    "options",
    [{"amsgrad": True}, {"maximize": True}, {"max_grad_norm": 1e-3}, {"state_dtype": BF16}],
    ids=str,
)
def test_every_option_starts_from_what_was_written(options):
    model, optimizer = trained(**options)
    through_data(model, WRITTEN)
    set_grads(list(model.parameters()), 3)
    optimizer.step()
    assert torch.equal(model.weight.isnan(), WRITTEN.isnan())
    assert torch.equal(model.weight[WRITTEN.isinf()], WRITTEN[WRITTEN.isinf()])
    finite = WRITTEN.isfinite()
    moved = (model.weight.detach().double() - WRITTEN.double()).abs()
    assert (moved <= 2 * half_unit(WRITTEN) + 1e-3 * WRITTEN.double().abs() + 10 * HYPER["lr"])[finite].all()


@pytest.mark.parametrize("value", [0.0, -0.0, torch.inf, -torch.inf])
def test_all_elements_zero_or_infinite(value):
    """As `p.data.zero_()` does, of all parameters; in every later step too."""
    model, optimizer = trained()
    for p in model.parameters():
        p.data.fill_(value)
    for step in range(3, 7):
        set_grads(list(model.parameters()), step)
        optimizer.step()
        for p in model.parameters():
            assert not p.isnan().any()
            assert p.isinf().all() if value * 0 != 0 else p.isfinite().all()


def through_a_file(model: Pairs, optimizer: grass.AdamW) -> tuple[Pairs, grass.AdamW]:
    """Into a model that has other weights, which are not loaded."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    fresh = Pairs()
    loaded = grass.AdamW(fresh.parameters(), **HYPER, master_weights=True)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    return fresh, loaded


def deepcopied(model: Pairs, optimizer: grass.AdamW) -> tuple[Pairs, grass.AdamW]:
    return copy.deepcopy((model, optimizer))


def pickled(model: Pairs, optimizer: grass.AdamW) -> tuple[Pairs, grass.AdamW]:
    return pickle.loads(pickle.dumps((model, optimizer)))


COPIES = [through_a_file, deepcopied, pickled]


@pytest.mark.parametrize("written", ["before the copy", "after it"])
@pytest.mark.parametrize("way", COPIES)
def test_copies_start_from_what_was_written(way, written):
    model, optimizer = trained()
    if written == "before the copy":
        through_data(model, WRITTEN)
    model, optimizer = way(model, optimizer)
    through_data(model, WRITTEN)
    twin, reference = oracle(model, optimizer.state[model.weight])
    set_grads([model.weight], 3)
    model.bias.grad, twin.grad = None, model.weight.grad.float()
    optimizer.step()
    reference.step()
    assert_near(joined(model.weight, optimizer.state[model.weight]), twin.detach(), WRITTEN)


@pytest.mark.parametrize("write", [in_place, through_data, new_data, load])
def test_a_state_dict_is_what_is_there(write):
    """Reading the state, or copying it, looks at no writes and changes nothing."""
    model, optimizer = trained()
    other, reference = trained()
    before = optimizer.state[model.weight]["remainder"].clone()
    values = normal(*WRITTEN.shape, seed=9).to(BF16)
    write(model, values)
    write(other, values)
    saved = optimizer.state_dict()["state"][0]["remainder"]
    assert torch.equal(saved, before)
    assert torch.equal(optimizer.state[model.weight]["remainder"], before)
    copied = copy.deepcopy(optimizer)
    (p, _) = copied.param_groups[0]["params"]
    assert torch.equal(copied.state[p]["remainder"], before)
    for own, each in ((model, optimizer), (other, reference)):
        set_grads(list(own.parameters()), 3)
        each.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(joined(p, optimizer.state[p]), joined(q, reference.state[q]))


# Modes

MODES = {
    "none": {"offload": "none"},
    "resident": {"offload": "resident"},
    "streamed": {"offload": "streamed", "buffer_mb": 0.25},
    "fused none": {"offload": "none", "fused_backward": True},
    "fused streamed": {"offload": "streamed", "buffer_mb": 0.25, "fused_backward": True},
}


def train_and_write(mode: str) -> tuple[nn.Module, grass.GrassAdamW]:
    """A run of the method with all biases set to a zero of either sign before some steps, outside of autograd."""
    model = tiny.stack(layers=3).to(BF16)
    config = tiny.config(active_layers=2, probe_steps=1, sample_interval=2, update_interval=2, **MODES[mode])
    opt = grass.GrassAdamW(model, lr=1e-3, master_weights=True, config=config, pattern="blocks.*")
    for step in range(5 if _triton.INTERPRETING else 9):
        if step in (3, 4, 6):
            for p in model.parameters():
                if p.dim() == 1:
                    p.data.fill_(-0.0 if step == 4 else 0.0)
        tiny.train(model, opt, step, step + 1)
        assert not any(p.isnan().any() for p in model.parameters()), step
    return model, opt


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_starts_from_what_was_written(mode):
    model, opt = train_and_write(mode)
    if mode != "none":
        other, reference = train_and_write("none")
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            assert torch.equal(p, q)
            if "remainder" in reference.state.get(q, ()):
                opt.state_dict()  # waits for copies
                assert torch.equal(opt.state[p]["remainder"], reference.state[q]["remainder"])


# Views of one flat buffer


def views(params: list[nn.Parameter]) -> tuple[Tensor, list[nn.Parameter]]:
    """Parameters of the same values that share one buffer, version counter included."""
    buffer = torch.cat([p.detach().flatten() for p in params])
    starts = [0, *torch.tensor([p.numel() for p in params]).cumsum(0).tolist()]
    return buffer, [
        nn.Parameter(buffer[start : start + p.numel()].view(p.shape)) for start, p in zip(starts, params, strict=False)
    ]  # fmt: skip


@pytest.mark.parametrize("added", [False, True], ids=["at once", "by add_param_group"])
def test_views_of_one_buffer_train_as_tensors_of_their_own(added):
    apart = [nn.Parameter(normal(*shape, seed=i).to(BF16)) for i, shape in enumerate([(4, 4), (33,), (2, 3)])]
    buffer, shared = views(apart)
    optimizers = []
    for params in (shared, apart):
        optimizer = grass.AdamW(params[:2] if added else params, **HYPER, master_weights=True)
        if added:
            optimizer.add_param_group({"params": params[2:]})
        optimizers.append(optimizer)
    for step in range(5):
        for params, optimizer in zip((shared, apart), optimizers, strict=True):
            set_grads(params, step)
            if step in (2, 3):  # steps of some alone
                params[step - 2].grad = None
            optimizer.step()
    assert torch.equal(buffer, torch.cat([p.detach().flatten() for p in apart]))
    for p, q in zip(shared, apart, strict=True):
        assert optimizers[0].state[p]["remainder"].any()
        for key, value in optimizers[1].state[q].items():
            assert torch.equal(optimizers[0].state[p][key], value), key


def test_views_of_one_buffer_in_two_optimizers():
    apart = [nn.Parameter(normal(33, seed=i).to(BF16)) for i in range(2)]
    _, shared = views(apart)
    optimizers = [[grass.AdamW([p], **HYPER, master_weights=True) for p in own] for own in (shared, apart)]
    for step in range(4):
        for params, own in zip((shared, apart), optimizers, strict=True):
            set_grads(params, step)
            for optimizer in own[:: 1 if step % 2 else -1]:
                optimizer.step()
    for p, q, one, other in zip(shared, apart, *optimizers, strict=True):
        assert one.state[p]["remainder"].any()
        assert torch.equal(joined(p, one.state[p]), joined(q, other.state[q]))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "AdamW"])
def test_views_of_one_buffer_under_the_method(kind):
    runs = []
    for share in (True, False):
        model = Model(BF16)
        if share:
            _, (model.blocks[0].weight, model.blocks[1].weight, model.head) = views(model.ordered())
        config = grass.GrassConfig(
            active_layers=1, probe_steps=0, sample_interval=2, update_interval=2, offload=KINDS[kind]
        )
        opt = grass.GrassAdamW(model, lr=1e-3, master_weights=True, config=config, pattern="blocks.*")
        for step in range(6):
            set_grads(model.ordered(), step)
            opt.step()
        opt.state_dict()  # waits for copies
        remainders = [
            opt.state[p]["remainder"] for p in model.ordered() if "remainder" in opt.state.get(p, ())
        ]
        assert len(remainders) > 1
        assert remainders[-1].any()
        runs.append([p.detach() for p in model.ordered()] + remainders)
    for shared, apart in zip(*runs, strict=True):
        assert torch.equal(shared, apart)


def test_a_backward_that_has_saved_views_ends_after_construction():
    """The optimizer writes nothing when it is made, nor when a group is added."""
    _, params = views([nn.Parameter(normal(4, seed=i).to(BF16)) for i in range(3)])
    loss = sum((p * p).float().sum() for p in params)
    optimizer = grass.AdamW(params[:2], master_weights=True)
    optimizer.add_param_group({"params": params[2:]})
    loss.backward()
    assert all(torch.equal(p.grad, 2 * p.detach()) for p in params)
