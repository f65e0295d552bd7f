"""Would catch: states that share memory, or that a copy engine would read across an unaligned address; memory taken for
layers that were never drawn, or before anything is written; sizes rounded up; a forecast that is not what comes; a
store that outlives its optimizer, or dies under a state dict.
"""

import gc
import itertools
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import grass
from grass.errors import OffloadError
from grass.offload.store import ALIGNMENT, Bucket, Slab, Store, allocating, section_layout
from tests.support import ragged, tiny

pytestmark = pytest.mark.plain_only(reason="not about kernels, and slow in the interpreter")

F32, BF16, I16 = torch.float32, torch.bfloat16, torch.int16
KINDS = [
    {"exp_avg": F32, "exp_avg_sq": F32},
    {"exp_avg": BF16, "exp_avg_sq": BF16},
    {"exp_avg": F32, "exp_avg_sq": F32, "remainder": I16},
    {"exp_avg": BF16, "exp_avg_sq": BF16, "max_exp_avg_sq": BF16, "remainder": I16},
]
FORMS = st.sampled_from(["flat", "matrix", "transposed", "channels_last", "scalar", "empty"])


def tensor(form: str, size: int) -> Tensor:
    if form == "matrix":
        return torch.zeros(size, 3)
    if form == "transposed":
        return torch.zeros(3, size).t()
    if form == "channels_last":
        return torch.zeros(2, 3, size, 2).to(memory_format=torch.channels_last)
    return torch.zeros({"flat": (size,), "scalar": (), "empty": (0, size)}[form])


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


# -- slabs --------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(FORMS, st.integers(1, 300)), max_size=8), st.sampled_from(KINDS))
def test_every_state_has_an_aligned_place_of_its_own(forms: list[tuple[str, int]], kinds: dict) -> None:
    params = [tensor(*form) for form in forms]
    slab = Slab(params, kinds, pinned=False)
    assert list(slab.sections) == list(kinds)
    views = {(i, kind): slab.view(p, kind) for i, p in enumerate(params) for kind in kinds}
    for (i, kind), view in views.items():
        p = params[i]
        assert (view.dtype, view.shape, view.stride()) == (kinds[kind], p.shape, p.stride())
        assert view.data_ptr() % ALIGNMENT == 0 or p.numel() == 0
        assert not view.any(), "not zero at first"
    for number, view in enumerate(views.values()):
        view.fill_(number + 1)
    for number, view in enumerate(views.values()):
        assert bool((view == number + 1).all()), "another state was written here"
    # a section is a run of the same places: what is element e of a parameter in one is so in all
    for i, p in enumerate(params):
        start = slab.starts[p]
        for number, section in enumerate(slab.sections.values()):
            own = section[start : start + p.numel()]
            assert bool((own == i * len(kinds) + number + 1).all())


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 100_000), max_size=8), st.sampled_from(KINDS))
def test_a_slab_takes_its_aligned_segments_and_not_a_byte_more(sizes: list[int], kinds: dict) -> None:
    asked: list[int] = []

    def allocate(num_bytes: int, pinned: bool) -> Tensor:
        asked.append(num_bytes)
        return torch.zeros(num_bytes, dtype=torch.uint8)

    params = [torch.empty(size, device="meta") for size in sizes]
    with allocating(allocate):
        slab = Slab(params, kinds, pinned=False)
    elements = sum((size + 127) // 128 * 128 for size in sizes)  # 128 of two bytes are ALIGNMENT
    assert slab.num_bytes == elements * sum(dtype.itemsize for dtype in kinds.values())
    assert asked == [max(1, slab.num_bytes)]
    assert slab.numel == elements
    assert section_layout(params) == (slab.starts, elements)


def test_mapped_memory_is_of_the_size_that_was_asked_for() -> None:
    """torch's own pinned memory is rounded up to a power of two."""
    params = [torch.empty(5 * 2**20 // 8 + 128, device="meta")]
    slab = Slab(params, KINDS[0], pinned=False)
    assert len(slab._memory) == slab.num_bytes == 5 * 2**20 + 1024


def test_memory_is_taken_when_it_is_written_and_given_back_with_the_last_view() -> None:
    megabytes = 64
    p = torch.empty(megabytes * 2**20 // 8, device="meta")
    before = resident_bytes()
    slab = Slab([p], KINDS[0], pinned=False)
    first, second = slab.view(p, "exp_avg"), slab.view(p, "exp_avg_sq")
    assert resident_bytes() - before < 4 * 2**20
    first.fill_(1.0)
    assert 28 * 2**20 < resident_bytes() - before < 36 * 2**20
    second.fill_(1.0)
    del slab, first
    assert resident_bytes() - before > 60 * 2**20, "a view is left"
    del second
    assert resident_bytes() - before < 4 * 2**20


def test_a_parameter_with_gaps_is_refused() -> None:
    base = torch.zeros(8, 6)
    for p in (base[:, :4], base[:, ::2], torch.zeros(1).expand(5)):
        with pytest.raises(OffloadError, match=r"make it contiguous, or use offload='none'"):
            Slab([torch.zeros(3), p], KINDS[0], pinned=False)


# -- the store ------------------------------------------------------------------------------------------------------


def test_a_slab_is_made_when_it_is_first_asked_for() -> None:
    members = [[torch.zeros(10), torch.zeros(3, 4)], [torch.zeros(1000)], []]
    store = Store([Bucket(list(members), dict(KINDS[2])) for members in members], pinned=False)
    assert store.num_bytes == 0
    assert store.max_bytes == (2 * 128 + 8 * 128) * 10
    assert [p in store for p in members[0]] == [True, True]
    assert torch.zeros(10) not in store
    assert store.bucket_of(members[1][0]) == 1
    view = store.view(members[1][0], "exp_avg")
    assert store.num_bytes == 8 * 128 * 10
    assert store.view(members[1][0], "exp_avg").data_ptr() == view.data_ptr()
    assert store.slab(1) is store.slab(1)
    store.slab(0)
    assert store.num_bytes == store.max_bytes


def test_what_was_never_given_out_is_known_to_be_zero() -> None:
    p, q = torch.zeros(10), torch.zeros(10)
    store = Store([Bucket(list(members), dict(KINDS[0])) for members in [[p, q]]], pinned=False)
    assert store.is_fresh(p, "exp_avg")
    store.view(p, "exp_avg")
    assert not store.is_fresh(p, "exp_avg")
    assert store.is_fresh(p, "exp_avg_sq")
    assert store.is_fresh(q, "exp_avg")


# -- an optimizer's store ------------------------------------------------------------------------------------------


def trained(steps: int, **options: Any) -> tuple[nn.Module, grass.GrassAdamW]:
    model = ragged.ragged(torch.bfloat16)
    amsgrad, master = options.pop("amsgrad", False), options.pop("master_weights", False)
    settings = ragged.config(**{"offload": "streamed", "buffer_mb": 1, **options})
    opt = grass.GrassAdamW(
        model, lr=1e-2, config=settings, pattern="blocks.*", amsgrad=amsgrad, master_weights=master
    )
    list(ragged.steps(model, opt, 0, steps))
    return model, opt


@pytest.mark.parametrize("offload", ["streamed", "resident"])
@pytest.mark.parametrize(("amsgrad", "master"), [(False, False), (True, False), (False, True), (True, True)])
def test_the_states_of_an_optimizer_are_in_one_slab_a_layer(
    offload: str, amsgrad: bool, master: bool
) -> None:
    model, opt = trained(10, offload=offload, amsgrad=amsgrad, master_weights=master)
    kinds = ["exp_avg", "exp_avg_sq"] + ["max_exp_avg_sq"] * amsgrad + ["remainder"] * master
    owner, drawn = tiny.layer_names(model, opt), opt._scheduler.draw_counts
    homes: dict[Any, list[tuple[int, int]]] = {}
    total = 0
    for name, p in model.named_parameters():
        state = opt.state.get(p, {})
        if not state:
            assert drawn[owner[name]] == 0
            continue
        assert sorted(state) == sorted([*kinds, "step"])
        for kind in kinds:
            assert state[kind].device.type == "cpu"
            assert state[kind].data_ptr() % ALIGNMENT == 0 or p.numel() == 0
            size = -(-p.numel() // 128) * 128 * state[kind].itemsize
            if size:  # what is in no layer has a slab a parameter
                home = name if owner[name] < 0 else owner[name]
                homes.setdefault(home, []).append((state[kind].data_ptr(), size))
            total += size
    assert len(homes) == 2 + sum(map(bool, drawn))
    for places in homes.values():  # one after another, without a gap: a section a kind
        places.sort()
        assert all(a + size == b for (a, size), (b, _) in itertools.pairwise(places))
    assert opt.transfer_stats.store_bytes == total


@pytest.mark.parametrize(("amsgrad", "master"), [(False, False), (True, True)])
def test_the_forecast_is_what_is_there_when_all_was_drawn(amsgrad: bool, master: bool) -> None:
    _, opt = trained(0, amsgrad=amsgrad, master_weights=master)
    forecast = opt._offload.store.max_bytes
    assert opt.transfer_stats.store_bytes == 0
    _, opt = trained(25, amsgrad=amsgrad, master_weights=master, sampler="cyclic")
    assert all(opt.draw_counts)
    assert opt.transfer_stats.store_bytes == forecast


def test_frozen_parameters_and_layers_have_no_place() -> None:
    model = ragged.ragged()
    model.blocks[1].requires_grad_(False)
    model.head.requires_grad_(False)
    opt = grass.GrassAdamW(model, config=ragged.config(offload="streamed"), pattern="blocks.*")
    store = opt._offload.store
    homeless = {name for name, p in model.named_parameters() if p not in store}
    assert homeless == {"head", *(f"blocks.1.{name}" for name, _ in model.blocks[1].named_parameters())}
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert store.max_bytes == sum(-(-p.numel() // 128) * 128 for p in trainable) * 8


class Wide(nn.Module):
    """A layer whose states are 32 MiB, and one that is never large."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(2048, 2048, bias=False), nn.Linear(8, 8, bias=False)])

    def forward(self) -> Tensor:
        return sum(block.weight.sum() for block in self.blocks if block.weight.requires_grad)


def wide(**options: Any) -> tuple[Wide, grass.GrassAdamW]:
    model = Wide()
    settings = grass.GrassConfig(
        active_layers=2, sampler="cyclic", offload="streamed", buffer_mb=1, **options
    )
    opt = grass.GrassAdamW(model, config=settings, pattern="blocks.*")
    model().backward()
    opt.step()
    opt.zero_grad()
    return model, opt


@pytest.mark.parametrize("fused", [False, True])
def test_the_store_is_given_back_with_the_optimizer(fused: bool) -> None:
    model, opt = wide(fused_backward=fused)
    size = opt.transfer_stats.store_bytes
    assert size > 32 * 2**20
    before = resident_bytes()
    del opt
    gc.collect()
    assert before - resident_bytes() > 0.9 * size
    assert model.blocks[0].weight.requires_grad


def test_a_state_dict_outlives_the_optimizer() -> None:
    model, opt = wide()
    expected = opt.state[model.blocks[0].weight]["exp_avg"].clone()
    assert expected.any()
    state = opt.state_dict()
    del opt, model
    gc.collect()
    assert torch.equal(state["state"][0]["exp_avg"], expected)


def test_states_are_never_made_beside_the_parameters() -> None:
    """On a GPU it would be the device's memory; here every allocation of such a size is seen."""

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.made: list[int] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if func in (torch.ops.aten.zeros_like.default, torch.ops.aten.zeros.default):
                self.made.append(out.numel())
            return out

    model = ragged.ragged()
    with Watch() as watch:
        opt = grass.GrassAdamW(model, config=ragged.config(offload="streamed"), pattern="blocks.*")
        list(ragged.steps(model, opt, 0, 6))
    assert max(watch.made) <= 1000, "a layer's moments were made elsewhere than in the store"
