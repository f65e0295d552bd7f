"""A disk without room, before and during a run.

Would catch: a run that begins though its files cannot be written; a save that fails and takes the run, or the
earlier checkpoint, with it; a half-written checkpoint that is left behind.
"""

import shutil
from collections import namedtuple
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from grass import GrassConfig
from grass.errors import SaveError
from grass.finetune.disk import bytes_needed
from grass.finetune.job import resume_run, start_run
from grass.finetune.options import FinetuneOptions
from grass.finetune.recording import Recorder
from grass.finetune.run_folder import RunFolder, read_rows
from grass.finetune.screen import Screen, quiet_libraries
from grass.finetune.stopping import Stopped

CONFIG = GrassConfig(active_layers=1, probe_steps=2, sample_interval=3, update_interval=3)
Usage = namedtuple("Usage", "total used free")


@pytest.fixture(autouse=True)
def quiet():
    with quiet_libraries():
        yield


@pytest.fixture
def options(tiny_model, problem_files, tmp_path):
    return FinetuneOptions(
        model=str(tiny_model),
        data=str(problem_files[0]),
        template="plain",
        steps=12,
        batch_size=4,
        lr=1e-2,
        log_steps=4,
        save_steps=4,
        output=str(tmp_path / "run"),
    )


def fill_disk(monkeypatch, when):
    """Make saving the model fail half-way, in folders for which `when` returns True."""
    original = PreTrainedModel.save_pretrained

    def save_pretrained(self, folder, **more):
        original(self, folder, **more)
        if when(str(folder)):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", save_pretrained)


def test_space_is_asked_before_anything_is_written(options, tiny_model, tmp_path, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    size = sum(p.numel() for p in model.parameters())
    assert bytes_needed(model, save_steps=4, steps=12) == 2 * 12 * size  # weights and two moments in float32
    assert bytes_needed(model, save_steps=0, steps=12) == 12 * size  # Ctrl-C saves one
    assert bytes_needed(model, save_steps=12, steps=12) == 12 * size
    assert (
        bytes_needed(model.bfloat16(), save_steps=0, steps=12) == 12 * size
    )  # with the remainders of the weights
    free = 24 * size - 1
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: Usage(0, 0, free))
    with pytest.raises(
        SaveError, match=rf"needs up to {24 * size:,} bytes .* but {free:,} bytes are free.*--output"
    ):
        start_run(options, CONFIG, Screen())
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: Usage(0, 0, 24 * size))
    start_run(options, CONFIG, Screen())


def test_a_resumed_run_has_the_room_of_its_checkpoints(options, tmp_path, monkeypatch):
    original = Recorder.on_step_end

    def on_step_end(self, args, state, control, **context):
        self.stop.requested = state.global_step == 5
        return original(self, args, state, control, **context)

    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "on_step_end", on_step_end)
        with pytest.raises(Stopped):
            start_run(options, CONFIG, Screen())
    there = sum(
        file.stat().st_size for file in (tmp_path / "run" / "checkpoints").rglob("*") if file.is_file()
    )
    needed = bytes_needed(AutoModelForCausalLM.from_pretrained(options.model), save_steps=4, steps=12)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: Usage(0, 0, needed - there - 1))
    with pytest.raises(SaveError, match="needs up to"):
        resume_run(tmp_path / "run", Screen())
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: Usage(0, 0, needed - there))
    resume_run(tmp_path / "run", Screen())


def test_a_checkpoint_that_fails_is_told_and_training_goes_on(options, tmp_path, monkeypatch, capsys):
    fill_disk(monkeypatch, lambda folder: folder.endswith("checkpoint-8"))
    seen = []
    original = Recorder.on_step_end

    def on_step_end(self, args, state, control, **context):
        seen.append(sorted(path.name for path in self.folder.checkpoints.glob("*")))
        return original(self, args, state, control, **context)

    monkeypatch.setattr(Recorder, "on_step_end", on_step_end)
    results = start_run(options, CONFIG, Screen())
    assert results["steps"] == 12
    assert seen[-1] == ["checkpoint-4"]
    shown = capsys.readouterr().err
    assert "checkpoint of step 8 cannot be saved: [Errno 28] No space left on device (" in shown
    assert "bytes are free on the disk); checkpoint-4 is kept" in shown


def test_ctrl_c_without_room_for_the_checkpoint_does_not_lose_the_steps(
    options, tmp_path, monkeypatch, capsys
):
    fill_disk(monkeypatch, lambda folder: folder.endswith("checkpoint-6"))
    original = Recorder.on_step_end

    def on_step_end(self, args, state, control, **context):
        self.stop.requested |= state.global_step in (6, 7)
        return original(self, args, state, control, **context)

    monkeypatch.setattr(Recorder, "on_step_end", on_step_end)
    with pytest.raises(Stopped, match="stopped after step 7 of 12"):
        start_run(options, CONFIG, Screen())
    assert "training goes on: make room, and press Ctrl-C again" in capsys.readouterr().err
    assert RunFolder.open(tmp_path / "run").last_checkpoint().name == "checkpoint-7"


def test_a_result_that_cannot_be_saved_is_trained_again_from_the_checkpoint(options, tmp_path, monkeypatch):
    whole = replace(options, output=str(tmp_path / "whole"))
    start_run(whole, CONFIG, Screen())
    with monkeypatch.context() as patch:
        fill_disk(patch, lambda folder: folder.endswith("model.tmp"))
        with pytest.raises(
            SaveError, match=r"No space left.*make room, then continue with: grass finetune --resume"
        ):
            start_run(options, CONFIG, Screen())
    folder = RunFolder.open(tmp_path / "run")
    assert folder.state == "stopped"
    assert folder.last_checkpoint().name == "checkpoint-8"
    assert not list(folder.path.glob("model*"))
    resume_run(folder.path, Screen())
    weights = [
        AutoModelForCausalLM.from_pretrained(p / "model").state_dict()
        for p in (folder.path, tmp_path / "whole")
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])


def test_rows_that_cannot_be_written_leave_a_run_to_resume(options, tmp_path, monkeypatch):
    from grass.finetune import recording

    def append_row(path, row):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(recording, "append_row", append_row)
        with pytest.raises(SaveError, match=r"No space left on device.*--resume"):
            start_run(options, CONFIG, Screen())
    resume_run(tmp_path / "run", Screen())
    assert [row["step"] for row in read_rows(tmp_path / "run" / "metrics.jsonl") if "lr" in row] == [4, 8, 12]
