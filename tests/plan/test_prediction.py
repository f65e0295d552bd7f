"""Failures these tests catch: a category that does not add up to what is in it, states of the wrong dtype or place, a
method that holds what it should have freed, traffic or arithmetic that is off by a factor, a loss with all logits, a
peak that shrinks with longer sequences, presets that are not the models they are called after.
"""

import dataclasses
import itertools

import pytest
import torch

from grass.config import GrassConfig
from grass.errors import ConfigError
from grass.plan import preset_names
from grass.plan.models import PlanError, build
from grass.plan.prediction import GIBIBYTE, METHODS, Case, _predict, predict
from tests.support.plan_model import SIZES

pytest.importorskip("transformers", reason="plans are of transformers models")

WIDTH, INNER, VOCAB, LAYERS = (
    SIZES[key] for key in ("hidden_size", "intermediate_size", "vocab_size", "num_hidden_layers")
)
LAYER_SHAPES = [(WIDTH, WIDTH)] * 4 + [(INNER, WIDTH)] * 2 + [(WIDTH, INNER)] + [(WIDTH,)] * 2
OUTSIDE_SHAPES = [(VOCAB, WIDTH), (VOCAB, WIDTH), (WIDTH,)]
BATCH, SEQ = 1, 16  # so that gradients and states make the peak, not logits


def numel(shape):
    return torch.Size(shape).numel()


def allocated(shapes, itemsize):
    """Bytes of tensors, each as the allocator rounds it."""
    return sum(-(-numel(shape) * itemsize // 512) * 512 for shape in shapes)


def in_store(shapes, itemsize):
    """Bytes of two moments; no parameter leaves a gap."""
    return 2 * sum(numel(shape) * itemsize for shape in shapes)


@pytest.fixture(scope="module")
def case(folder):
    return Case(str(folder), batch=BATCH, seq=SEQ, buffer_mb=0.25, sample_interval=10, master_weights=False)


@pytest.fixture(scope="module")
def rows(case):
    return {row.method: row for row in predict(case)}


def size(gib):
    return round(gib * GIBIBYTE)


def one(case, method, **changes):
    return next(iter(predict(dataclasses.replace(case, **changes), [method])))


def test_every_method_has_a_row_whose_parts_add_up(rows):
    assert list(rows) == list(METHODS)
    for row in rows.values():
        parts = row.weights_gib + row.gradients_gib + row.states_device_gib + row.activations_gib
        assert parts == pytest.approx(row.peak_gib)


def test_weights_are_the_models(rows):
    shapes = [*LAYER_SHAPES * LAYERS, *OUTSIDE_SHAPES]
    frequencies = 2 * 512  # rotary, as used and as made
    for method, row in rows.items():
        if not method.startswith("lora"):
            assert size(row.weights_gib) == allocated(shapes, 2) + frequencies
    lora = size(rows["lora-r128"].weights_gib) - allocated(shapes, 2) - frequencies
    assert lora == sum(
        allocated([(128, inputs), (outputs, 128)], 4)
        for outputs, inputs in (s for s in LAYER_SHAPES if len(s) == 2)
    ) * LAYERS  # fmt: skip


def test_full_has_all_gradients_and_moments_of_the_weights_dtype(rows):
    shapes = [*LAYER_SHAPES * LAYERS, *OUTSIDE_SHAPES]
    assert size(rows["full"].states_device_gib) == 2 * allocated(shapes, 2) + 512 * len(
        shapes
    )  # and counters
    assert size(rows["full"].gradients_gib) == allocated(shapes, 2)


def test_grass_without_offload_has_fp32_moments_of_all_layers(rows):
    shapes = [*LAYER_SHAPES * LAYERS, *OUTSIDE_SHAPES]
    assert size(rows["grass"].states_device_gib) == 2 * allocated(shapes, 4) + 512 * len(shapes)
    assert rows["grass"].states_host_gib == 0


def test_grass_adamw_has_the_gradients_of_full_and_the_states_of_grass(rows):
    row = rows["grass-adamw"]
    assert row.gradients_gib == rows["full"].gradients_gib
    assert row.step_floor_ms == rows["full"].step_floor_ms
    own = size(row.states_device_gib - rows["grass"].states_device_gib)
    assert 0 <= own < 512 * len([*LAYER_SHAPES * LAYERS, *OUTSIDE_SHAPES])  # norms of the step, no moments
    assert row.states_host_gib == row.h2d_gib_per_step == 0


def test_master_weights_are_two_bytes_more_of_each_state(case, rows):
    shapes = [*LAYER_SHAPES * LAYERS, *OUTSIDE_SHAPES]
    with_masters = {row.method: row for row in predict(dataclasses.replace(case, master_weights=True))}
    for method in ("grass-resident", "grass-streamed", "grass-streamed-fused"):
        more = size(with_masters[method].states_host_gib) - size(rows[method].states_host_gib)
        assert more == sum(numel(shape) * 2 for shape in shapes)
    kept = size(with_masters["grass"].states_device_gib) - size(rows["grass"].states_device_gib)
    assert kept == allocated(shapes, 2)
    moved = with_masters["grass-streamed"].h2d_gib_per_step / rows["grass-streamed"].h2d_gib_per_step
    assert moved == pytest.approx(10 / 8)
    for method in ("full", "lisa"):
        assert with_masters[method] == rows[method]
    in_float32 = dataclasses.replace(case, dtype=torch.float32)
    assert one(in_float32, "grass") == one(dataclasses.replace(in_float32, master_weights=True), "grass")


def test_lisa_has_moments_of_what_trains(rows):
    shapes = [*LAYER_SHAPES * 2, *OUTSIDE_SHAPES]
    assert size(rows["lisa"].states_device_gib) == 2 * allocated(shapes, 2) + 512 * len(shapes)


def test_resident_holds_two_sets_and_streamed_its_ring(rows):
    counters = 512 * (
        4 * len(LAYER_SHAPES) + len(OUTSIDE_SHAPES)
    )  # of both sets: they stay beside the weights
    slabs = in_store(LAYER_SHAPES * 4 + OUTSIDE_SHAPES, 4)
    held = size(rows["grass-resident"].states_device_gib)
    assert slabs + counters <= held <= slabs + counters + 512 * 5
    ring = 3 * 256 * 1024
    assert ring + counters == size(rows["grass-streamed"].states_device_gib)


def test_the_host_holds_what_the_device_does_not(rows):
    everything = in_store(LAYER_SHAPES * LAYERS + OUTSIDE_SHAPES, 4)
    for method in ("grass-resident", "grass-streamed", "grass-streamed-fused"):
        assert size(rows[method].states_host_gib) == everything


def test_states_are_all_that_differs_by_where_they_are(rows):
    beside = [
        row.peak_gib - row.states_device_gib for row in (rows["grass"], rows["grass-resident"], rows["lisa"])
    ]
    assert beside[0] == pytest.approx(beside[1], abs=1e-5)  # tables of the kernels
    assert beside[0] == pytest.approx(beside[2], abs=1e-5)  # tables of the kernels
    assert rows["grass-streamed"].peak_gib < rows["grass-resident"].peak_gib < rows["grass"].peak_gib


def test_fused_backward_frees_gradients_on_the_way(rows):
    assert rows["grass-streamed-fused"].gradients_gib < rows["grass-streamed"].gradients_gib
    assert rows["grass-streamed-fused"].peak_gib <= rows["grass-streamed"].peak_gib


@pytest.mark.parametrize(
    ("vocab", "batch", "worst"),
    [(VOCAB, 4, (2, 3)), (256, 1, (2, 4))],
    ids=["the last frozen", "the last but one"],
)
def test_fused_is_what_the_worst_set_takes(case, tmp_path, vocab, batch, worst):
    """Against every set of active layers. The worst is not the last layers: frozen ones recompute more at a time, and
    do so while gradients above them are held."""
    import transformers

    transformers.LlamaConfig(**{**SIZES, "vocab_size": vocab}).save_pretrained(tmp_path)
    case = dataclasses.replace(case, model=str(tmp_path), batch=batch, seq=512)
    model = build(case.model, case.dtype)
    peaks = {}
    for active in itertools.combinations(range(LAYERS), case.active_layers):
        frozen = tuple(LAYERS - 1 - layer for layer in range(LAYERS) if layer not in active)
        peaks[active] = _predict(case, "grass-streamed-fused", model, frozen).peak_gib
    assert one(case, "grass-streamed-fused").peak_gib == max(peaks.values())
    assert peaks[worst] == max(peaks.values()) > peaks[3, 4]


def test_probing_never_holds_all_gradients_and_has_no_states(case, rows):
    wide = one(case, "full").gradients_gib
    for method, row in rows.items():
        if method.endswith("-probing"):
            assert row.gradients_gib < wide / 2
            assert row.states_device_gib == 0


@pytest.mark.parametrize("method", ["grass-resident-probing", "grass-streamed-fused-probing"])
def test_one_run_of_the_probe_stands_for_others(case, rows, method):
    """A plan runs it once with fused backward and once without; alone, a row is run as what it says."""
    assert one(case, method) == rows[method]


def test_streamed_states_cross_the_bus_in_every_step(rows):
    trained = in_store(LAYER_SHAPES * 2 + OUTSIDE_SHAPES, 4)
    for method in ("grass-streamed", "grass-streamed-fused"):
        assert size(rows[method].h2d_gib_per_step) == size(rows[method].d2h_gib_per_step) == trained


def test_resident_states_cross_it_once_in_a_period(rows):
    moved = in_store(LAYER_SHAPES * 2, 4) / 10
    row = rows["grass-resident"]
    assert row.h2d_gib_per_step * GIBIBYTE == row.d2h_gib_per_step * GIBIBYTE == pytest.approx(moved)
    assert rows["grass"].h2d_gib_per_step == 0


def floor(products, tflops=150.0):
    return products / (tflops * 1e12) * 1e3


def test_the_floor_is_the_arithmetic(case):
    """Three products a weight, and attention's, which makes one of its two again."""
    tokens = BATCH * SEQ
    case = dataclasses.replace(case, loss="full")
    matrices = LAYERS * sum(numel(s) for s in LAYER_SHAPES if len(s) == 2) + VOCAB * WIDTH
    attention = LAYERS * 2 * BATCH * SEQ * SEQ * WIDTH
    kept = one(case, "full", checkpointing=False)
    assert kept.step_floor_ms == pytest.approx(floor(3 * 2 * tokens * matrices + 7 * attention))
    again = one(case, "full")
    layers = matrices - VOCAB * WIDTH
    # torch leaves out the last product of a layer that is computed again: nothing needs it
    most = floor(2 * tokens * (4 * layers + 3 * VOCAB * WIDTH) + 9 * attention)
    assert 0.9 * most < again.step_floor_ms <= most * (1 + 1e-9)
    few = one(case, "grass").step_floor_ms
    frozen = (LAYERS - 2) * sum(numel(s) for s in LAYER_SHAPES if len(s) == 2)
    assert again.step_floor_ms - few == pytest.approx(floor(2 * tokens * frozen))


@pytest.mark.parametrize("family", ["Mixtral", "Qwen3Moe"])
def test_the_floor_of_experts_is_of_those_that_tokens_are_routed_to(case, family, tmp_path):
    """Arithmetic grows with the experts of a token, and copies with all experts of the layers that train."""
    import transformers

    chosen, floors, moved = 2, {}, {}
    for experts in (4, 8):
        config = getattr(transformers, f"{family}Config")(
            **SIZES, num_local_experts=experts, num_experts=experts, num_experts_per_tok=chosen,
            moe_intermediate_size=INNER, head_dim=WIDTH // 4,
        )  # fmt: skip
        config.save_pretrained(tmp_path / str(experts))
        at = dataclasses.replace(case, model=str(tmp_path / str(experts)), loss="full", buffer_mb=4.0)
        full, few = (one(at, name).step_floor_ms for name in ("full", "grass"))
        layer = 4 * WIDTH * WIDTH + experts * WIDTH + chosen * 3 * WIDTH * INNER
        # the gradients of the weights that do not train
        assert full - few == pytest.approx(floor(2 * BATCH * SEQ * (LAYERS - 2) * layer))
        assert one(at, "lora-r128").step_floor_ms > full  # and no warning of peft
        everything = dataclasses.replace(at, active_layers=LAYERS)
        assert one(everything, "grass").step_floor_ms == pytest.approx(full)
        assert one(everything, "lisa").step_floor_ms == pytest.approx(full)
        floors[experts] = full
        moved[experts] = one(at, "grass-streamed").h2d_gib_per_step
    router = 4 * WIDTH * 2 * BATCH * SEQ * LAYERS
    assert floors[8] - floors[4] == pytest.approx(
        floor(4 * router), rel=0.3
    )  # checkpoints leave some of it out
    more = in_store([(WIDTH, INNER)] * 3, 4) * 2 * 4
    assert (moved[8] - moved[4]) * GIBIBYTE == pytest.approx(more, rel=0.01)  # and the routers'


def test_the_floor_is_the_bus_where_that_is_slower(case):
    row = one(case, "grass-streamed", pcie_gbs=0.001)
    assert row.step_floor_ms == pytest.approx(row.h2d_gib_per_step * GIBIBYTE / 1e6 * 1e3)


@pytest.mark.parametrize("method", ["full", "lora-r128", "grass-streamed-fused"])
def test_longer_sequences_take_no_less(case, method):
    peaks = [one(case, method, seq=seq).peak_gib for seq in (32, 128, 512)]
    assert peaks == sorted(peaks)
    assert peaks[-1] > peaks[0]


def test_activations_are_kept_without_checkpointing(case):
    case = dataclasses.replace(case, batch=4, seq=256)
    assert one(case, "full", checkpointing=False).activations_gib > 1.5 * one(case, "full").activations_gib


def test_no_mask_grows_with_the_square_of_the_length(case):
    """A mask is for padding; a plan has none, and a GPU takes another path of attention with one."""
    sizes = {"batch": 4, "loss": "full", "checkpointing": False}
    short, middle, long = (one(case, "full", seq=seq, **sizes).activations_gib for seq in (128, 256, 512))
    assert long - middle == pytest.approx(2 * (middle - short), rel=0.01)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_chunked_loss_never_holds_all_logits(case, dtype):
    sizes = {"batch": 8, "seq": 512, "dtype": dtype}  # chunks have 512 tokens
    whole, chunked = (one(case, "grass-streamed-fused", loss=loss, **sizes) for loss in ("full", "chunked"))
    logits = 8 * 512 * VOCAB * 4 / GIBIBYTE
    assert whole.peak_gib - chunked.peak_gib > logits


def test_the_chunked_loss_costs_the_logits_twice_in_low_precision(case):
    """Its gradients are computed in backward, from logits made anew; in float32 they are made on the way."""
    head = floor(2 * BATCH * SEQ * VOCAB * WIDTH)
    for dtype, products in ((torch.bfloat16, 1), (torch.float32, 0)):
        whole, chunked = (one(case, "full", loss=loss, dtype=dtype) for loss in ("full", "chunked"))
        assert chunked.step_floor_ms - whole.step_floor_ms == pytest.approx(products * head, abs=1e-9)


def test_the_chunked_loss_takes_what_torch_s_does():
    """Where torch's path is the same on every device, in float32; low precision differs in dtypes alone."""
    chunked = pytest.importorskip("torch.nn.modules.linear_cross_entropy", reason="torch before 2.13")
    from torch._subclasses.fake_tensor import FakeTensorMode

    from grass.plan import losses
    from grass.plan.tracker import ACTIVATIONS, MemoryTracker

    peaks = []
    for ours in (True, False):
        mode, tracker = FakeTensorMode(), MemoryTracker()
        with mode, tracker, torch.no_grad():
            hidden, weight = torch.empty(1024, 64), torch.empty(4096, 64)
            targets = torch.empty(1024, dtype=torch.int64)
            if ours:
                kept = losses._gradients(hidden, weight, targets, 128, (True, True))
            else:
                kept = chunked._linear_cross_entropy_batch_chunked_accumulator(
                    hidden, weight, targets, None, None, "sum", -100, 0.0, 128, "compact", torch.float32,
                    compute_input_grad=True, compute_linear_weight_grad=True, compute_linear_bias_grad=False,
                )  # fmt: skip
        peaks.append((tracker.peak()[ACTIVATIONS], tracker.flops))
        del kept
    assert peaks[0][0] == pytest.approx(peaks[1][0], rel=0.02)
    assert peaks[0][1] == 3 * 2 * 1024 * 64 * 4096


def test_state_dtype_halves_what_is_moved_and_kept(case):
    narrow, wide = (one(case, "grass-streamed", state_dtype=t) for t in (torch.bfloat16, torch.float32))
    assert 2 * narrow.states_host_gib == wide.states_host_gib
    assert 2 * narrow.h2d_gib_per_step == wide.h2d_gib_per_step


def test_tied_weights_count_once(folder, tmp_path):
    from transformers import LlamaConfig

    LlamaConfig(**{**SIZES, "tie_word_embeddings": True}).save_pretrained(tmp_path)
    case = Case(str(folder), batch=BATCH, seq=SEQ)
    for method in ("full", "grass-streamed-fused", "grass-probing"):
        apart, tied = one(case, method), one(dataclasses.replace(case, model=str(tmp_path)), method)
        assert size(apart.weights_gib - tied.weights_gib) == allocated([(VOCAB, WIDTH)], 2)


def test_what_does_not_fit_the_model_is_refused(case):
    with pytest.raises(PlanError, match="512 positions"):
        one(case, "full", seq=513)
    with pytest.raises(ConfigError, match="only 5 layers"):
        one(case, "grass", active_layers=6)
    with pytest.raises(ConfigError, match="loss must be one of chunked, full, not 'auto'"):
        dataclasses.replace(case, loss="auto")
    assert one(case, "grass-resident", active_layers=5).peak_gib > 0  # all of them: there is no other set


def test_defaults_are_the_methods_own():
    case = Case("any")
    for name in ("active_layers", "sample_interval", "buffer_mb", "buffer_count"):
        assert getattr(case, name) == getattr(GrassConfig(), name)


@pytest.mark.parametrize(
    ("name", "num_params"),
    [
        ("gemma-2b", 2_506_172_416),
        ("llama2-70b", 68_976_648_192),
        ("llama2-7b", 6_738_415_616),
        ("llama3-8b", 8_030_261_248),
        ("qwen2.5-7b", 7_615_616_512),
        ("tinyllama-1.1b", 1_100_048_384),
    ],
)
def test_presets_have_as_many_parameters_as_the_models(name, num_params):
    assert name in preset_names()
    assert sum(p.numel() for p in build(name, torch.bfloat16).parameters()) == num_params


def test_llama2_7b_takes_what_was_simulated_and_measured():
    """Simulated 50.9 GiB by other means; the paper measures 51.3. Fused: with the gradients of a layer that are held
    for their update (0.38), and three buffers (0.19)."""
    full, fused, probing = predict(
        Case("llama2-7b"), ["full", "grass-streamed-fused", "grass-streamed-fused-probing"]
    )
    assert full.peak_gib == pytest.approx(50.9, rel=0.03)
    assert probing.peak_gib <= fused.peak_gib <= 14.9
