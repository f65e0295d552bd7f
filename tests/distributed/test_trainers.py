"""Failures these tests catch: a trainer that shards the model after the optimizer has been made, which then trains what
is no longer in the model; a configuration file that does not work as it is; clipping, accumulation, checkpoints and
logs of a trainer that are those of one rank.
"""

import contextlib
import io
import runpy
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import grass
from tests.distributed.test_checkpoints import largest_difference, weights
from tests.support import tiny
from tests.support.accelerated import launched

pytestmark = pytest.mark.plain_only(
    reason="processes with the interpreter are slow, and shards are ordinary tensors"
)

FILES = Path(__file__).parents[2] / "examples" / "accelerate"
STEPS, BATCH = 12, 4


def shard(model, shape):
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def part(ids):
    """This rank's part of a batch."""
    return ids.chunk(dist.get_world_size())[dist.get_rank()] if dist.is_initialized() else ids


def loop(file, probe_steps, fused):
    """A loop of accelerate: the optimizer is made before the model is sharded."""
    from accelerate import Accelerator

    with launched(FILES / file) if file else contextlib.nullcontext(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        accelerator = Accelerator(cpu=file is None)
        model = tiny.llama()
        if file == "replicas.yaml":
            shard(model, (2, 1))
        config = tiny.config(probe_steps=probe_steps, fused_backward=fused)
        made = grass.GrassAdamW(model, lr=1e-3, eps=1e-3, config=config)
        model, optimizer = accelerator.prepare(model, made)
        for index in range(STEPS):
            accelerator.backward(tiny.loss_of(model, part(tiny.batch(index, size=BATCH))))
            if not fused:
                accelerator.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
        return weights(model), made.importance, made.draw_counts


@pytest.mark.parametrize(
    ("file", "probe_steps", "fused"),
    [("fsdp2.yaml", 3, False), ("fsdp2.yaml", 0, True), ("replicas.yaml", 3, False)],
)
def test_a_loop_of_accelerate_follows_one_process(two, file, probe_steps, fused):
    """Point 8: accelerate replaces the parameters of the optimizer."""
    expected, importance, counts = loop(None, probe_steps, fused)
    for found, found_importance, found_counts in two.run(loop, file, probe_steps, fused):
        assert largest_difference(expected, found) < 1e-6
        assert torch.allclose(found_importance, importance, rtol=1e-4)
        assert found_counts == counts


def test_a_loop_of_accelerate_with_replicas_of_shards_follows_one_process(four):
    expected, _, counts = loop(None, 3, False)
    for found, _, found_counts in four.run(loop, "hsdp.yaml", 3, False):
        assert largest_difference(expected, found) < 1e-6
        assert found_counts == counts


def example(file):
    """Return the output of examples/accelerate_loop.py."""
    output = io.StringIO()
    with launched(FILES / file), contextlib.redirect_stdout(output), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sys.path.insert(0, str(FILES.parent))
        runpy.run_path(str(FILES.parent / "accelerate_loop.py"), run_name="__main__")
    return output.getvalue()


def test_the_example_of_accelerate_runs_with_its_configuration_file(two):
    first, second = two.run(example, "fsdp2.yaml")
    assert first.startswith("12 steps, loss ")
    assert first.partition("draws")[2] == second.partition("draws")[2] != ""


@pytest.mark.parametrize(
    ("line", "changed", "probe_steps", "limit"),
    [
        ("fsdp_cpu_ram_efficient_loading: false", "fsdp_cpu_ram_efficient_loading: true", 3, 1e-6),
        ('mixed_precision: "no"', "mixed_precision: bf16", 0, 5e-3),
    ],
)
def test_other_settings_of_accelerate_work(two, tmp_path, line, changed, probe_steps, limit):
    """Weights that rank 0 loads; float32 copies of weights, with layers that are frozen at the first forward."""
    text = (FILES / "fsdp2.yaml").read_text()
    assert line in text
    file = tmp_path / "changed.yaml"
    file.write_text(text.replace(line, changed))
    expected, _, _ = loop(None, probe_steps, False)
    for found, _, _ in two.run(loop, file, probe_steps, False):
        assert largest_difference(expected, found) < limit


class Sums(torch.utils.data.Dataset):
    """Texts of the batches of `tiny.batch`, one by one, in this order for every number of ranks."""

    def __len__(self):
        return BATCH * STEPS * 2

    def __getitem__(self, index):
        ids = tiny.batch(index, size=1)[0]
        return {"input_ids": ids, "labels": ids}


class InOrder(torch.utils.data.Sampler):
    def __iter__(self):
        return iter(range(BATCH * STEPS * 2))

    def __len__(self):
        return BATCH * STEPS * 2


def trainer(file, folder, resume, fused, accumulation=1):
    """`transformers.Trainer`, which makes the optimizer after the model has been sharded."""
    from transformers import Trainer, TrainingArguments

    from grass.integrations.transformers import GrassCallback, trainer_optimizer

    class Ordered(Trainer):
        def _get_train_sampler(self, dataset=None):
            return InOrder()

    with launched(FILES / file) if file else contextlib.nullcontext(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ranks = dist.get_world_size() if file else 1
        args = TrainingArguments(
            str(folder),
            per_device_train_batch_size=BATCH // ranks // accumulation,
            gradient_accumulation_steps=accumulation,
            max_steps=STEPS,
            save_steps=STEPS // 2,
            logging_steps=3,
            learning_rate=1e-3,
            adam_epsilon=1e-3,
            max_grad_norm=0.0 if fused else 1.0,
            lr_scheduler_type="constant",
            report_to="none",
            use_cpu=file is None,
            dataloader_pin_memory=False,
            disable_tqdm=True,
        )
        model = tiny.llama(seed=1 if resume else 0)  # of a run that resumes, the checkpoint has the weights
        if file == "replicas.yaml":
            shard(model, (2, 1))
        run = Ordered(
            model,
            args,
            train_dataset=Sums(),
            optimizer_cls_and_kwargs=trainer_optimizer(args=args, config=tiny.config(fused_backward=fused)),
        )
        run.add_callback(GrassCallback(run))
        run.train(resume_from_checkpoint=resume)
        made = getattr(run.optimizer, "optimizer", run.optimizer)
        norms = [entry["grass/grad_norm"] for entry in run.state.log_history if "grass/grad_norm" in entry]
        return weights(run.model), made.draw_counts, norms


@pytest.mark.parametrize(
    ("file", "fused"), [("fsdp2.yaml", False), ("fsdp2.yaml", True), ("replicas.yaml", False)]
)
def test_trainer_follows_one_process_and_resumes(two, tmp_path, file, fused):
    expected, counts, norms = trainer(None, tmp_path / "one", None, fused)
    folder = tmp_path / "two"
    for found, found_counts, found_norms in two.run(trainer, file, folder, None, fused):
        assert largest_difference(expected, found) < 1e-6
        assert found_counts == counts
        assert found_norms == pytest.approx(norms, rel=1e-3)
    last = str(folder / f"checkpoint-{STEPS // 2}")
    for found, found_counts, _ in two.run(trainer, file, tmp_path / "three", last, fused):
        assert largest_difference(expected, found) < 1e-6
        assert found_counts == counts


@pytest.mark.parametrize("fused", [False, True])
def test_trainer_accumulates_by_ranks_as_one_process_takes_the_whole_batch(two, tmp_path, fused):
    """FSDP2 reduces the sum of the micro-batches, and that is what the probe measures."""
    expected, counts, _ = trainer(None, tmp_path / "one", None, fused)
    for found, found_counts, _ in two.run(trainer, "fsdp2.yaml", tmp_path / "two", None, fused, 2):
        assert found_counts == counts
        assert largest_difference(expected, found) < 1e-6


def lightning(shape, folder, clip=None, resume=None):
    """Lightning's strategy for FSDP2, with a mesh of a shape; one device without it."""
    import lightning
    from lightning.pytorch.strategies import ModelParallelStrategy

    from grass.integrations.lightning import GrassCallback

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = tiny.llama(seed=1 if resume else 0)

        def configure_model(self):
            if shape:
                shard(self.model, shape)

        def training_step(self, batch, index):
            ids = tiny.batch(self.global_step, size=BATCH)  # a resumed run reads its data from the beginning
            return tiny.loss_of(self.model, part(ids) if shape else ids)

        def configure_optimizers(self):
            return grass.GrassAdamW(self.model, lr=1e-3, eps=1e-3, config=tiny.config())

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = lightning.Trainer(
            accelerator="cpu",
            devices=2 if shape else 1,
            strategy=ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1) if shape else "auto",
            max_steps=STEPS,
            gradient_clip_val=clip,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            use_distributed_sampler=False,
            callbacks=[GrassCallback(), Save(folder / "half")],
        )
        module = Module()
        run.fit(module, torch.utils.data.DataLoader(range(STEPS), batch_size=None), ckpt_path=resume)
        return weights(module.model), run.optimizers[0].draw_counts


def Save(path):
    """Return a callback that saves a checkpoint in the middle of a run."""
    import lightning

    class Saving(lightning.Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == STEPS // 2:
                trainer.save_checkpoint(path)

    return Saving()


@pytest.mark.parametrize(("shape", "clip"), [((1, 2), None), ((1, 2), 0.1), ((2, 1), None)])
def test_lightning_follows_one_process_and_resumes(two, tmp_path, shape, clip):
    pytest.importorskip("lightning", reason="the test is of it")
    expected, counts = lightning(None, tmp_path / "one", clip)
    if clip:
        assert largest_difference(expected, lightning(None, tmp_path / "unclipped")[0]) > 1e-4
    for found, found_counts in two.run(lightning, shape, tmp_path / "two", clip):
        assert largest_difference(expected, found) < 1e-6
        assert found_counts == counts
    for found, found_counts in two.run(
        lightning, shape, tmp_path / "three", clip, str(tmp_path / "two" / "half")
    ):
        assert largest_difference(expected, found) < 1e-6
        assert found_counts == counts


def supervised(file, folder):
    """TRL's SFTTrainer."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from grass.integrations.transformers import GrassCallback, trainer_optimizer

    sys.path.insert(0, str(FILES.parent))
    from tiny_model import make_model, make_sums, make_tokenizer

    with launched(FILES / file) if file else contextlib.nullcontext(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        args = SFTConfig(
            str(folder),
            per_device_train_batch_size=BATCH // (2 if file else 1),
            max_steps=STEPS,
            learning_rate=1e-3,
            adam_epsilon=1e-3,
            lr_scheduler_type="constant",
            save_strategy="no",
            report_to="none",
            use_cpu=file is None,
            bf16=False,
            gradient_checkpointing=False,
            dataloader_pin_memory=False,
            disable_tqdm=True,
        )
        rows = [{"prompt": question, "completion": answer} for question, answer in make_sums(BATCH * STEPS)]
        model = make_model()
        if file == "replicas.yaml":
            shard(model, (2, 1))
        run = SFTTrainer(
            model,
            args,
            train_dataset=Dataset.from_list(rows),
            processing_class=make_tokenizer(),
            optimizer_cls_and_kwargs=trainer_optimizer(args=args, config=tiny.config()),
        )
        run.add_callback(GrassCallback(run))
        run.train()
        made = getattr(run.optimizer, "optimizer", run.optimizer)
        return weights(run.model), made.draw_counts, made.importance


@pytest.mark.parametrize("file", ["fsdp2.yaml", "replicas.yaml"])
def test_the_trainer_of_trl_follows_one_process(two, tmp_path, file):
    """Completions have one token each, so that the mean of two means is that of all."""
    pytest.importorskip("trl", reason="the test is of it")
    expected, counts, importance = supervised(None, tmp_path)
    for found, found_counts, found_importance in two.run(supervised, file, tmp_path):
        assert found_counts == counts
        assert torch.allclose(found_importance, importance, rtol=1e-3)
        assert largest_difference(expected, found) < 1e-6
