"""Would catch: bad input that is found out in the middle of training, answered without a figure or a remedy, or that
leaves a trace: parameters frozen, hooks on them, an older optimizer ended, groups or states half changed.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import grass
from grass.errors import ConfigError, OffloadError, StateMismatchError
from grass.offload import host
from grass.offload.host import available_bytes, check_host_memory
from tests.support import ragged, tiny

pytestmark = pytest.mark.plain_only(reason="not about kernels, and slow in the interpreter")

STREAMED, RESIDENT = {"offload": "streamed"}, {"offload": "resident"}
OFFLOADS = [STREAMED, RESIDENT]


def trace(model: nn.Module) -> dict[str, Any]:
    """Traces that construction could leave on a model."""
    return {
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "hooks": [len(p._post_accumulate_grad_hooks or ()) for p in model.parameters()],
        "module hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "gradients": [p.grad is None for p in model.parameters()],
        "places": [p.data_ptr() for p in model.parameters()],
    }


def gapped() -> nn.Module:
    model = ragged.ragged()
    model.blocks[2].weight.data = torch.randn(130, 200)[:, :134]
    return model


def half_on_meta() -> nn.Module:
    model = ragged.ragged()
    model.blocks[2].weight = nn.Parameter(model.blocks[2].weight.to("meta"))
    return model


def construct(model: nn.Module, options: dict[str, Any] | None = None, **settings: Any) -> grass.GrassAdamW:
    return grass.GrassAdamW(model, config=ragged.config(**settings), pattern="blocks.*", **(options or {}))


TOO_SMALL = {"offload": "streamed", "buffer_mb": 0.125}
BAD: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], dict[str, Any], type[Exception], str]] = {
    "unknown offload": (
        ragged.ragged, {"offload": "disk"}, {}, ConfigError,
        r"offload must be one of auto, none, resident, streamed, not 'disk'",
    ),
    "no buffer": (
        ragged.ragged, {"buffer_count": 0}, {}, ConfigError, r"buffer_count .* at least 1, not 0",
    ),
    "half a buffer": (
        ragged.ragged, {"buffer_count": 1.5}, {}, ConfigError, r"buffer_count must be an integer .* not 1\.5",
    ),
    "buffers of nothing": (
        ragged.ragged, {"buffer_mb": 0}, {}, ConfigError, r"buffer_mb must be a positive number of MiB, not 0",
    ),
    "endless buffers": (
        ragged.ragged, {"buffer_mb": float("inf")}, {}, ConfigError, r"buffer_mb .* not inf",
    ),
    "buffers by name": (
        ragged.ragged, {"buffer_mb": "64"}, {}, ConfigError, r"buffer_mb .* not '64'",
    ),
    "a word for yes": (
        ragged.ragged, {"fused_backward": "yes"}, {}, ConfigError,
        r"fused_backward must be True or False, not 'yes'",
    ),
    "less than a chunk": (
        ragged.ragged, TOO_SMALL, {}, ConfigError,
        r"131,072 bytes, and the smallest unit of states has 131,584: pass buffer_mb of at least 0\.13",
    ),
    "less than a chunk of three moments": (
        ragged.ragged, {"offload": "streamed", "buffer_mb": 0.18}, {"amsgrad": True}, ConfigError,
        r"188,743 bytes, and the smallest unit of states has 197,376: pass buffer_mb of at least 0\.19",
    ),
    "fused and clipping": (
        ragged.ragged, {"fused_backward": True}, {"max_grad_norm": 1.0}, ConfigError,
        r"fused_backward and max_grad_norm exclude each other: most layers are updated before",
    ),
    "several devices, streamed": (
        half_on_meta, STREAMED, {}, OffloadError,
        r"several devices \(cpu, meta\).*put the model on one device, or use offload='none'",
    ),
    "several devices, resident": (half_on_meta, RESIDENT, {}, OffloadError, r"several devices"),
    "gaps": (gapped, STREAMED, {}, OffloadError, r"\(130, 134\).* make it contiguous, or use offload='none'"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_a_clear_error_and_changes_nothing(name: str) -> None:
    make, settings, options, error, remedy = BAD[name]
    model = make()
    before, weights = trace(model), tiny.weights(model)
    with pytest.raises(error, match=remedy) as raised:
        construct(model, options, **settings)
    assert isinstance(raised.value, grass.GrassError)
    assert trace(model) == before
    for name, p in model.named_parameters():
        assert p.device.type == "meta" or torch.equal(p, weights[name])


@pytest.mark.parametrize("name", BAD)
def test_bad_input_does_not_end_an_older_optimizer(name: str) -> None:
    make, settings, options, error, _ = BAD[name]
    if make is not ragged.ragged:
        pytest.skip("a model that cannot be offloaded at all")
    model = make()
    older = construct(model, **STREAMED)
    list(ragged.steps(model, older, 0, 4))
    before, state = trace(model), copy.deepcopy(tiny.flat(older.state_dict()))
    with pytest.raises(error):
        construct(model, options, **settings)
    assert trace(model) == before
    tiny.assert_identical(tiny.flat(older.state_dict()), state)
    list(ragged.steps(model, older, 4, 6))


# -- host memory ------------------------------------------------------------------------------------------


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], None]:
    return lambda available: monkeypatch.setattr(host, "available_bytes", lambda: available)


@pytest.mark.parametrize("settings", OFFLOADS, ids=str)
def test_a_store_that_will_not_fit_is_refused_before_training(
    memory: Callable, settings: dict[str, Any]
) -> None:
    model = ragged.ragged()
    needed = construct(model, **settings)._offload.store.max_bytes
    memory(needed - 1)
    model = ragged.ragged()
    before = trace(model)
    with pytest.raises(OffloadError) as raised:
        construct(model, **settings)
    for part in (
        f"{needed:,} bytes",
        f"{needed - 1:,}",
        "state_dtype=torch.bfloat16",
        "always_active='none'",
    ):
        assert part in str(raised.value)
    assert trace(model) == before
    construct(model, {"state_dtype": torch.bfloat16}, **settings)  # the message's own remedy
    memory(needed)
    construct(ragged.ragged(), **settings)
    memory(None)  # nobody knows
    construct(ragged.ragged(), **settings)
    memory(0)
    construct(ragged.ragged(), offload="none")


@pytest.mark.parametrize("settings", OFFLOADS, ids=str)
def test_parameters_whose_states_will_not_fit_are_not_added(
    memory: Callable, settings: dict[str, Any]
) -> None:
    model = ragged.ragged()
    late = [model.head]
    opt = construct_of(model, [p for p in model.parameters() if p is not model.head], **settings)
    list(ragged.steps(model, opt, 0, 4))
    model.head.grad = None
    before, state, stats = trace(model), copy.deepcopy(tiny.flat(opt.state_dict())), opt.transfer_stats
    memory(1000)
    with pytest.raises(OffloadError, match="host memory"):
        opt.add_param_group({"params": late})
    assert len(opt.param_groups) == 1
    assert trace(model) == before
    tiny.assert_identical(tiny.flat(opt.state_dict()), state)
    assert opt.transfer_stats == stats
    list(ragged.steps(model, opt, 4, 8))


def construct_of(model: nn.Module, params: list[nn.Parameter], **settings: Any) -> grass.GrassAdamW:
    return grass.GrassAdamW(params, model=model, config=ragged.config(**settings), pattern="blocks.*")


def test_a_group_on_another_device_is_not_added() -> None:
    for settings in OFFLOADS:
        model = half_on_meta()
        stray = model.blocks[2].weight
        opt = construct_of(model, [p for p in model.parameters() if p is not stray], **settings)
        before = trace(model)
        with pytest.raises(OffloadError, match="several devices"):
            opt.add_param_group({"params": [stray]})
        assert len(opt.param_groups) == 1
        assert trace(model) == before
        assert opt.state_dict()["state"].keys() == set(range(len(opt.param_groups[0]["params"])))


def files(monkeypatch: pytest.MonkeyPatch, **content: str) -> None:
    """Files by the last part of their names; all others are missing."""
    monkeypatch.setattr(host, "_read", lambda path: content.get(path.rsplit("/", 1)[1].replace(".", "_"), ""))


MEMINFO = "MemTotal:  100 kB\nMemAvailable:       80 kB\nSwapFree: 7 kB\n"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"meminfo": MEMINFO}, 80 * 1024),
        ({"meminfo": MEMINFO, "memory_max": "max\n", "memory_current": "5\n"}, 80 * 1024),
        ({"meminfo": MEMINFO, "memory_max": "50000\n", "memory_current": "20000\n"}, 30000),
        ({"meminfo": MEMINFO, "memory_max": "500000\n", "memory_current": "20000\n"}, 80 * 1024),
        (
            {
                "memory_max": "50000\n",
                "memory_current": "20000\n",
                "memory_stat": "anon 9\ninactive_file 700\n",
            },
            30700,
        ),
        ({"memory_max": "50000\n", "memory_current": "60000\n"}, 0),
        (
            {
                "memory_limit_in_bytes": "50000",
                "memory_usage_in_bytes": "20000",
                "memory_stat": "total_inactive_file 50\n",
            },
            30050,
        ),
        ({}, None),
    ],
)
def test_available_memory_heeds_a_containers_limits(
    monkeypatch: pytest.MonkeyPatch, content: dict[str, str], expected: int | None
) -> None:
    files(monkeypatch, **content)
    assert available_bytes() == expected
    check_host_memory(expected or 0)
    if expected is not None:
        with pytest.raises(OffloadError, match=f"{expected + 1:,} bytes .* and {expected:,} "):
            check_host_memory(expected + 1)


def test_this_machine_has_memory() -> None:
    found = available_bytes()
    assert found is None or 2**20 < found < 2**50


# -- checkpoints of others ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", OFFLOADS, ids=str)
def test_checkpoints_of_others_are_refused_and_change_nothing(settings: dict[str, Any]) -> None:
    def trained(layers: int = 4, **more: Any) -> dict[str, Any]:
        model = ragged.ragged(layers=layers)
        opt = construct(model, **more)
        list(ragged.steps(model, opt, 0, 5))
        return opt.state_dict()

    model = ragged.ragged()
    opt = construct(model, **settings)
    list(ragged.steps(model, opt, 0, 6))
    narrow = ragged.ragged()
    for block in narrow.blocks:
        block.bias = nn.Parameter(torch.randn(8))
    other = construct(narrow, **settings)
    list(ragged.steps(narrow, other, 0, 5))
    lacking = trained()
    del lacking["state"][3]
    cases = [
        (trained(layers=5), "of another model"),
        (other.state_dict(), "shape|layer map"),
        (trained(ema=0.9), r"ema: saved 0\.9, now 0\.5"),
        (lacking, "lacks the state of 1 parameters"),
        ({}, "param_groups"),
    ]
    before, weights, on = copy.deepcopy(tiny.flat(opt.state_dict())), tiny.weights(model), trace(model)
    places = {p: s["exp_avg"].data_ptr() for p, s in opt.state.items()}
    for state, match in cases:
        with pytest.raises(StateMismatchError, match=match):
            opt.load_state_dict(state)
        tiny.assert_identical(tiny.flat(opt.state_dict()), before)
        tiny.assert_identical(tiny.weights(model), weights)
        assert trace(model) == on
        assert {p: s["exp_avg"].data_ptr() for p, s in opt.state.items()} == places
    # and goes on as if nothing had been tried
    twin = ragged.ragged()
    alone = construct(twin)
    list(ragged.steps(twin, alone, 0, 6))
    for m, o in ((model, opt), (twin, alone)):
        list(ragged.steps(m, o, 6, 11))
    tiny.assert_identical(ragged.outcome(model, opt, []), ragged.outcome(twin, alone, []))


@pytest.mark.parametrize("settings", OFFLOADS, ids=str)
def test_a_moment_of_another_shape_is_refused_before_anything_moves(settings: dict[str, Any]) -> None:
    """In any kind of state, not only the first."""
    model = ragged.ragged()
    opt = construct(model, {"amsgrad": True}, **{"buffer_mb": 1, **settings})
    list(ragged.steps(model, opt, 0, 6))
    before = copy.deepcopy(tiny.flat(opt.state_dict()))
    for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
        state = copy.deepcopy(opt.state_dict())
        last = max(state["state"])
        state["state"][last] = {**state["state"][last], key: torch.zeros(3, 3)}
        for entry in state["state"].values():
            if entry:  # of a parameter that has been stepped
                entry["step"] = entry["step"] + 1
        with pytest.raises(StateMismatchError, match="shape"):
            opt.load_state_dict(state)
        tiny.assert_identical(tiny.flat(opt.state_dict()), before)
