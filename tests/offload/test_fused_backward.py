"""Would catch: gradients that live longer than their layer's update; updates in another order than backward's, before
the last micro-batch, or from half a gradient (tied weights, checkpointing); a second backward that updates twice
without a word; a backward that failed and left weights, moments and counters that do not agree, a state that cannot
be saved, or an optimizer that cannot go on; settings under which it cannot work and does not say so; hooks left behind.
"""

import functools
import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn
from torch.utils.data import Dataset

import grass
from bench.offload.order import conflicts
from bench.offload.recording import RecordingEngine
from grass.errors import BackwardError
from grass.integrations.transformers import trainer_optimizer
from grass.optim.offload_manager import OffloadManager
from tests.support import tiny
from tests.support.fused import FUSED, MODES, STEPS, backward, compare, stack, torn, watch

pytestmark = pytest.mark.plain_only(reason="not about kernels, and slow in the interpreter")


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


# -- what is where, and when -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("offload", MODES)
@pytest.mark.parametrize("always", ["outside", "none"])
def test_gradients_are_freed_layer_by_layer(always: str, offload: str) -> None:
    model, opt = stack(active_layers=4, always_active=always, **MODES[offload])
    outside = 0 if always == "none" else model.embed.weight.numel()  # the head is not larger
    a_layer = sum(p.numel() for p in model.blocks[0].parameters())
    alive: list[int] = []

    def look(p: Tensor) -> None:
        alive.append(sum(q.grad.numel() for q in model.parameters() if q.grad is not None))

    watch(model, look)
    for index in range(1, 8):
        alive.clear()
        backward(model, index)
        assert len(alive) >= 4 * 6
        assert max(alive) <= max(a_layer, outside)
        assert all(p.grad is None for p in model.parameters()), "all was updated"
        opt.step()
        opt.zero_grad()


def test_updates_come_in_the_order_of_backward() -> None:
    """The head, layers from above, the embedding: each when its gradients are complete."""
    model, opt = stack(active_layers=3)
    seen: list[tuple[int, ...]] = []
    changes: list[str] = []
    names = {p: name for name, p in model.named_parameters()}

    def look(p: Tensor) -> None:
        seen.append(opt.torn_layers)
        fresh = [
            name for q, name in names.items() if name not in changes and not torch.equal(q, before[name])
        ]
        changes.extend(sorted(fresh))

    watch(model, look)
    for index in range(1, 8):
        layers = sorted(opt.active_layers, reverse=True)
        seen.clear(), changes.clear()
        before = tiny.weights(model)
        assert opt.torn_layers == ()
        backward(model, index)
        look(model.head.weight)  # whichever hook came last
        assert opt.torn_layers == (5, *layers), "5 stands for all that is in no layer"
        assert seen == sorted(seen, key=len)
        assert all(done == (5, *layers)[: len(done)] for done in seen)
        members = {layer: sorted(n for n in before if n.startswith(f"blocks.{layer}.")) for layer in layers}
        expected = ["head.weight", *(name for layer in layers for name in members[layer]), "embed.weight"]
        assert changes == expected
        opt.step()
        assert opt.torn_layers == ()
        opt.zero_grad()


@pytest.mark.parametrize("offload", MODES)
def test_weights_change_inside_backward_and_step_only_counts(offload: str) -> None:
    model, opt = stack(**MODES[offload])
    before, count = tiny.weights(model), opt.step_count
    backward(model, 1)
    after = tiny.weights(model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name in before if not torch.equal(before[name], after[name])} == trained
    assert opt.step_count == count
    opt.step()
    tiny.assert_identical(tiny.weights(model), after)
    assert opt.step_count == count + 1
    opt.step()  # nothing came since
    assert opt.step_count == count + 1


def test_norms_are_those_of_a_plain_step() -> None:
    (model, opt), (twin, other) = stack(), stack(fused_backward=False)
    for index in range(1, STEPS):
        for m, o in ((model, opt), (twin, other)):
            backward(m, index)
            o.step()
            o.zero_grad()
        assert opt.layer_grad_norms.count_nonzero() == 2
        assert torch.equal(opt.layer_grad_norms, other.layer_grad_norms)
        torch.testing.assert_close(opt.grad_norm, other.grad_norm, rtol=1e-6, atol=0)
        assert torch.equal(opt.importance, other.importance)
    assert opt.num_refreshes == other.num_refreshes > 1


# -- micro-batches ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offload", MODES)
def test_micro_batches_that_are_declared_add_up(offload: str) -> None:
    (model, opt), (twin, other) = stack(**MODES[offload]), stack(fused_backward=False)
    for index in range(1, STEPS):
        before = tiny.weights(model)
        with opt.accumulate():
            backward(model, 10 * index)
            with opt.accumulate():
                backward(model, 10 * index + 1)
            backward(model, 10 * index + 2)
        tiny.assert_identical(tiny.weights(model), before)
        assert opt.torn_layers == ()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        if index % 3:
            backward(model, 10 * index + 3)
            assert opt.torn_layers
        for micro in range(3 + bool(index % 3)):
            backward(twin, 10 * index + micro)
        for o in (opt, other):
            o.step()
            o.zero_grad()
    compare(model, opt, twin, other)


def test_a_declaration_ends_with_an_error_inside() -> None:
    model, opt = stack()
    with pytest.raises(ZeroDivisionError), opt.accumulate():
        1 / 0  # noqa: B018
    opt.zero_grad()
    backward(model, 1)
    assert len(opt.torn_layers) == 3


def test_without_fused_backward_and_in_the_probe_a_declaration_does_nothing() -> None:
    runs = []
    for fused in (False, True):
        model = tiny.stack()
        opt = grass.GrassAdamW(model, config=tiny.config(fused_backward=fused))
        for index in range(6):
            with opt.accumulate():
                backward(model, 2 * index)
            backward(model, 2 * index + 1)
            opt.step()
            opt.zero_grad()
        runs.append((model, opt))
    compare(*runs[0], *runs[1])


@pytest.mark.parametrize("always", ["outside", "none"])
def test_a_second_backward_that_was_not_declared_is_an_error_at_its_first_hook(always: str) -> None:
    model, opt = stack(always_active=always, active_layers=3)
    backward(model, 1)
    after, counters = tiny.weights(model), {p: float(s["step"]) for p, s in opt.state.items()}
    arrived: list[Tensor] = []
    watch(model, arrived.append)
    with pytest.raises(BackwardError, match=r"that update stays.*with optimizer\.accumulate\(\)") as raised:
        backward(model, 2)
    assert "step(), which counts the updates as a step, or zero_grad()" in str(raised.value)
    assert isinstance(raised.value, grass.GrassError)
    assert not arrived, "a hook behind the first one's layer was reached"
    assert all(p.grad is None for p in model.parameters())
    tiny.assert_identical(tiny.weights(model), after)
    assert {p: float(s["step"]) for p, s in opt.state.items()} == counters
    # and on: step() ends the step as if the second backward had not been
    twin, other = stack(always_active=always, active_layers=3)
    backward(twin, 1)
    for o in (opt, other):
        o.step()
        o.zero_grad()
    tiny.train(model, opt, 3, STEPS)
    tiny.train(twin, other, 3, STEPS)
    compare(model, opt, twin, other)


@pytest.mark.parametrize("offload", MODES)
def test_accelerate_says_which_micro_batch_is_the_last(offload: str) -> None:
    results = []
    for fused in (True, False):
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        model = tiny.stack()
        mode = {**MODES[offload], **FUSED} if fused else {}
        opt = grass.GrassAdamW(model, lr=1e-2, config=tiny.config(probe_steps=1, **mode))
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        prepared, wrapped = accelerator.prepare(model, opt)
        for index in range(2 * STEPS):
            with accelerator.accumulate(prepared):
                accelerator.backward(tiny.loss_of(prepared, tiny.batch(index)))
                if fused and opt.phase == "adapt":
                    assert bool(opt.torn_layers) == accelerator.sync_gradients == bool(index % 2)
                wrapped.step()
                wrapped.zero_grad()
        assert opt.step_count == STEPS
        results.append((model, opt))
    compare(*results[0], *results[1])


# -- gradients that come in parts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("offload", MODES)
def test_tied_weights_wait_for_the_step(offload: str) -> None:
    def run(**mode: Any) -> tuple[nn.Module, grass.GrassAdamW]:
        model = tiny.llama(layers=4, tied=True)
        opt = grass.GrassAdamW(model, lr=1e-2, config=tiny.config(probe_steps=1, **mode))
        for index in range(STEPS):
            before = tiny.weights(model)
            backward(model, index)
            if mode and opt.phase == "adapt":
                assert set(opt.torn_layers) == {*opt.active_layers, 4}, "the final norm need not wait"
                assert model.model.norm.weight.grad is None
                assert model.lm_head.weight.grad is not None
                assert torch.equal(model.lm_head.weight, before["model.embed_tokens.weight"])
            opt.step()
            opt.zero_grad()
        return model, opt

    compare(*run(**MODES[offload], **FUSED), *run())


def test_a_weight_shared_by_two_layers_waits_too() -> None:
    def run(**mode: Any) -> tuple[nn.Module, grass.GrassAdamW]:
        model = tiny.stack()
        model.blocks[3].up.weight = model.blocks[1].up.weight
        opt = grass.GrassAdamW(model, lr=1e-2, config=tiny.config(probe_steps=1, **mode), pattern="blocks.*")
        tiny.train(model, opt, 0, STEPS)
        return model, opt

    compare(*run(**FUSED), *run())


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("always", ["outside", "none"])
def test_activation_checkpointing(always: str, reentrant: bool, tied: bool) -> None:
    def run(**mode: Any) -> tuple[nn.Module, grass.GrassAdamW]:
        model = tiny.llama(layers=4, tied=tied)
        tiny.checkpoint_activations(model, reentrant)
        settings = tiny.config(probe_steps=1, always_active=always, **mode)
        opt = grass.GrassAdamW(model, lr=1e-2, config=settings)
        for index in range(8):
            with opt.accumulate():
                backward(model, 2 * index)
            backward(model, 2 * index + 1)
            opt.step()
            opt.zero_grad()
        return model, opt

    compare(*run(**MODES["streamed"], **FUSED), *run())


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> RecordingEngine:
    """The engine of the next optimizer."""
    engine = RecordingEngine()
    made_with = functools.partialmethod(OffloadManager.__init__, engine=lambda device: engine)
    monkeypatch.setattr(OffloadManager, "__init__", made_with)
    return engine


def updates_of(engine: RecordingEngine) -> list[int]:
    return [i for i, entry in enumerate(engine.log.entries) if entry.operation.kind == "update"]


def joins_of(engine: RecordingEngine) -> list[int]:
    return [wait.operations for wait in engine.log.waits if wait.hazard == "H8"]


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning")
@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("always", ["outside", "none", "*norm*"])
def test_backward_waits_for_its_updates_once_and_at_its_end(
    always: str, reentrant: bool | None, engine: RecordingEngine
) -> None:
    """Not after each reentrant checkpoint, whose own backward ends with the layer: nothing would overlap. If every
    gradient arrives in such a one, `step` waits."""
    model = tiny.llama(layers=4)
    if reentrant is not None:
        tiny.checkpoint_activations(model, reentrant)
    config = tiny.config(probe_steps=0, active_layers=3, always_active=always, **MODES["streamed"], **FUSED)
    opt = grass.GrassAdamW(model, lr=1e-2, config=config)
    for index in range(4):
        before = len(updates_of(engine))
        backward(model, index)
        first, *_, last = updates_of(engine)[before:]
        inside = [join for join in joins_of(engine) if join > first]
        assert len(inside) == (0 if reentrant and always == "none" else 1)
        opt.step()
        assert last < next(join for join in joins_of(engine) if join > first)
        assert conflicts(engine.log) == []
        opt.zero_grad()


@pytest.mark.filterwarnings("ignore:an earlier backward has failed:UserWarning")
@pytest.mark.filterwarnings("ignore:the state was saved inside a step:UserWarning")
@pytest.mark.parametrize("offload", ["streamed", "resident"])
@pytest.mark.parametrize("then", ["zero_grad", "release", "load", "forward", "step", "backward"])
def test_updates_of_a_backward_that_failed_are_waited_for(
    offload: str, then: str, engine: RecordingEngine
) -> None:
    """Its end did not come. Weights may be read next, and the memory of gradients used again."""
    model, opt = torn(offload)
    last = updates_of(engine)[-1]
    assert opt._offload is not None
    assert opt._offload.pipeline._held
    waited = len(joins_of(engine))
    if then == "zero_grad":
        opt.zero_grad()
    elif then == "release":
        opt.release()
    elif then == "load":
        opt.load_state_dict(opt.state_dict())
    elif then == "forward":
        model(tiny.batch(3))
    elif then == "step":
        opt.step()
    else:
        model.zero_grad()
        backward(model, 4)
    assert joins_of(engine)[waited] > last
    assert not opt._offload.pipeline._held
    assert conflicts(engine.log) == []


def test_an_update_that_fails_half_way_is_waited_for(engine: RecordingEngine) -> None:
    """Those of its units that have been queued read gradients, which the caller will clear."""
    model = tiny.stack(width=96)  # layers of several units
    config = tiny.config(probe_steps=1, active_layers=3, **FUSED, **MODES["streamed"])
    opt = grass.GrassAdamW(model, lr=1e-2, config=config)
    tiny.train(model, opt, 0, 1)
    assert opt._offload is not None
    run = type(opt._offload.pipeline).run
    begun = []

    def failing_run(self: Any, bucket: int, update: Any) -> None:
        def fail(unit: Any, views: Any) -> None:
            if len(begun) == 3:
                raise RuntimeError("out of memory")
            begun.append(unit)
            update(unit, views)

        run(self, bucket, fail)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(opt._offload.pipeline), "run", failing_run)
        with pytest.raises(RuntimeError, match="out of memory"):
            backward(model, 1)
    last = updates_of(engine)[-1]
    waited = len(joins_of(engine))
    opt.zero_grad()
    assert joins_of(engine)[waited] > last
    assert "free" in [entry.operation.kind for entry in engine.log.entries[last:]]
    assert conflicts(engine.log) == []


def test_step_waits_for_what_it_updates_itself(engine: RecordingEngine) -> None:
    """Tied weights are updated by `step`, after the end of backward."""
    model = tiny.llama(tied=True)
    opt = grass.GrassAdamW(model, lr=1e-2, config=tiny.config(probe_steps=0, **MODES["streamed"], **FUSED))
    for index in range(3):
        backward(model, index)
        before = len(updates_of(engine))
        opt.step()
        assert len(updates_of(engine)) > before
        assert joins_of(engine)[-1] > updates_of(engine)[-1]
        assert opt._offload is not None
        assert not opt._offload.pipeline._held
        assert conflicts(engine.log) == []
        opt.zero_grad()


class Twice(nn.Module):
    """A block that is used twice under one name, in two reentrant segments: its hooks fire for each."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = torch.utils.checkpoint.checkpoint(self.block, x, use_reentrant=True)
        return x


def test_a_gradient_that_comes_after_its_update_is_not_lost_in_silence() -> None:
    model = tiny.stack()
    for index, block in enumerate(model.blocks):
        model.blocks[index] = Twice(block)
    opt = grass.GrassAdamW(
        model, lr=1e-2, config=tiny.config(probe_steps=0, active_layers=5, **FUSED), pattern="blocks.*"
    )
    with pytest.raises(BackwardError, match="a second gradient"):
        backward(model, 1)
    assert opt.torn_layers


# -- what it excludes -----------------------------------------------------------------------------------------------


def test_a_scaler_is_refused_with_the_reason() -> None:
    model, opt = stack()
    amp = torch.amp.GradScaler("cpu", init_scale=8.0)
    amp.scale(tiny.loss_of(model, tiny.batch(1))).backward()
    with pytest.raises(
        grass.GrassError, match=r"fused_backward and a GradScaler exclude each other: .* still scaled"
    ):
        amp.step(opt)


def test_after_a_scaler_was_refused_training_goes_on_without() -> None:
    """It had left its scale on the optimizer, to be read by a step that did not come."""
    model, opt = stack()
    amp = torch.amp.GradScaler("cpu", init_scale=8.0)
    amp.scale(tiny.loss_of(model, tiny.batch(1))).backward()
    with pytest.raises(grass.GrassError, match="GradScaler"):
        amp.step(opt)
    opt.zero_grad()
    count = opt.step_count
    tiny.train(model, opt, 2, 5)
    assert opt.step_count == count + 3


def test_a_scaler_that_is_switched_off_is_none() -> None:
    (model, opt), (twin, other) = stack(), stack()
    amp = torch.amp.GradScaler("cpu", enabled=False)
    for index in range(1, STEPS):
        amp.scale(tiny.loss_of(model, tiny.batch(index))).backward()
        amp.step(opt)
        amp.update()
        opt.zero_grad()
    tiny.train(twin, other, 1, STEPS)
    compare(model, opt, twin, other)


# -- hooks and lives ------------------------------------------------------------------------------------------------


def hooks(model: nn.Module) -> int:
    return sum(len(p._post_accumulate_grad_hooks or ()) for p in model.parameters())


def test_hooks_are_on_what_trains_and_go_with_the_optimizer() -> None:
    for how in ("release", "garbage"):
        model, opt = stack()
        for index in range(1, 12):
            trained = sum(p.requires_grad for p in model.parameters())
            assert hooks(model) == trained
            tiny.train(model, opt, index, index + 1)
        backward(model, 12)
        if how == "release":
            opt.release()
        ref = weakref.ref(opt)
        del opt
        gc.collect()
        assert ref() is None
        assert hooks(model) == 0
        assert all(p.requires_grad for p in model.parameters())
        backward(model, 13)
        assert all(p.grad is not None for p in model.parameters())


def test_a_newer_optimizer_updates_alone() -> None:
    model, older = stack()
    newer = grass.GrassAdamW(model, lr=1e-2, config=tiny.config(probe_steps=0, seed=3, **FUSED))
    twin = tiny.stack()
    twin.load_state_dict(model.state_dict())
    alone = grass.GrassAdamW(twin, lr=1e-2, config=tiny.config(probe_steps=0, seed=3, **FUSED))
    tiny.train(model, newer, 0, 8)
    tiny.train(twin, alone, 0, 8)
    compare(model, newer, twin, alone)
    with pytest.raises(grass.GrassError, match="newer one"):
        older.step()


def test_parameters_added_while_training_are_updated_inside_backward() -> None:
    model = tiny.stack()
    late = list(model.blocks[0].parameters())
    early = [p for p in model.parameters() if not any(p is q for q in late)]
    opt = grass.GrassAdamW(early, lr=1e-2, model=model, config=tiny.config(probe_steps=1, **FUSED))
    tiny.train(model, opt, 0, 2)
    opt.add_param_group({"params": late})
    assert hooks(model) == sum(p.requires_grad for p in model.parameters())
    for index in range(2, 20):
        backward(model, index)
        assert all(p.grad is None for p in model.parameters())
        opt.step()
        opt.zero_grad()
    assert opt.draw_counts[0] > 0


# -- Trainer ----------------------------------------------------------------------------------------------------------


class Ids(Dataset):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = tiny.batch(index, size=1)[0]
        return {"input_ids": ids, "labels": ids}


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_run_of_trainer(tmp_path: Path, micro_batches: int) -> None:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Watch(TrainerCallback):
        """Backward has updated when the step begins, and in no micro-batch before the last."""

        def __init__(self) -> None:
            self.torn: list[bool] = []

        def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            assert method_of(kwargs["optimizer"]).torn_layers == ()

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.torn.append(bool(method_of(kwargs["optimizer"]).torn_layers))

    def method_of(opt: Any) -> grass.GrassAdamW:
        return getattr(opt, "optimizer", opt)

    def run(name: str, **mode: Any) -> tuple[nn.Module, grass.GrassAdamW, list[bool]]:
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        model = tiny.llama(layers=4)
        args = TrainingArguments(
            output_dir=str(tmp_path / name), max_steps=8, per_device_train_batch_size=2, max_grad_norm=0,
            gradient_accumulation_steps=micro_batches, learning_rate=1e-2, warmup_steps=3, save_strategy="no",
            report_to=[], disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False, seed=1,
        )  # fmt: skip
        given = trainer_optimizer(lr=1e-2, weight_decay=0.1, config=tiny.config(probe_steps=2, **mode))
        watch = Watch()
        trainer = Trainer(model, args, train_dataset=Ids(), optimizer_cls_and_kwargs=given, callbacks=[watch])
        trainer.train()
        return model, method_of(trainer.optimizer), watch.torn

    model, opt, updated = run("fused", **FUSED, **MODES["streamed"])
    twin, other, _ = run("plain")
    assert opt.step_count == other.step_count == 8
    assert updated == [False] * 2 + [True] * 6
    compare(model, opt, twin, other)
