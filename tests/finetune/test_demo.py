"""The built-in demo, at a fraction of its length.

Would catch: a demo that needs the network or a file; a base model trained again, or other than before, after a
stop; a demo that a busy machine stalls; a demo shorter than what it is meant to show.
"""

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from grass import GrassConfig
from grass.finetune import demo
from grass.finetune.job import resume_run, start_run
from grass.finetune.recording import Recorder
from grass.finetune.run_folder import RunFolder, read_rows
from grass.finetune.screen import Screen, quiet_libraries
from grass.finetune.stopping import Stopped

CONFIG = GrassConfig(probe_steps=2, sample_interval=3, update_interval=3, seed=1)


@pytest.fixture(autouse=True)
def short_demo(monkeypatch):
    monkeypatch.setattr(demo, "BASE_OPTIONS", replace(demo.BASE_OPTIONS, steps=4, batch_size=8))
    monkeypatch.setattr(demo, "NUM_TRAIN", 40)
    monkeypatch.setattr(demo, "NUM_HELDOUT", 6)
    with quiet_libraries():
        yield


def stop_after(monkeypatch, title, step):
    original = Recorder.on_step_end

    def on_step_end(self, args, state, control, **context):
        if self.title == title and state.global_step == step:
            self.stop.requested = True
        return original(self, args, state, control, **context)

    monkeypatch.setattr(Recorder, "on_step_end", on_step_end)


def test_the_demo_and_one_stopped_twice_end_alike(tmp_path, monkeypatch):
    options = replace(demo.DEMO_OPTIONS, steps=8, batch_size=4, log_steps=3)
    results = start_run(replace(options, output=str(tmp_path / "whole")), CONFIG, Screen())
    assert results["layers"] == 6
    assert results["active_layers"] == 2
    assert results["answers"] == 6
    assert sum(results["draw_counts"]) == 2 * 2

    again = RunFolder(tmp_path / "stopped", {})
    with monkeypatch.context() as patch:
        stop_after(patch, "base model", 2)
        with pytest.raises(Stopped, match="stopped after step 2 of 4"):
            start_run(replace(options, output=str(again.path)), CONFIG, Screen())
    with monkeypatch.context() as patch:
        stop_after(patch, "training", 5)
        with pytest.raises(Stopped, match="stopped after step 5 of 8"):
            resume_run(again.path, Screen())
    assert RunFolder.open(again.path / "base").state == "trained"
    with monkeypatch.context() as patch:
        patch.setattr(demo, "train", pytest.fail)
        resume_run(again.path, Screen())

    for model in ("base/model", "model"):
        a, b = (
            AutoModelForCausalLM.from_pretrained(tmp_path / run / model).state_dict()
            for run in ("whole", "stopped")
        )
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert read_rows(again.layers) == read_rows(tmp_path / "whole" / "layers.jsonl")


def test_the_demo_runs_on_one_thread_and_gives_the_others_back(tmp_path, monkeypatch):
    threads = []
    original = Recorder.on_train_begin

    def on_train_begin(self, *args, **context):
        threads.append(torch.get_num_threads())
        return original(self, *args, **context)

    monkeypatch.setattr(Recorder, "on_train_begin", on_train_begin)
    torch.set_num_threads(2)
    start_run(replace(demo.DEMO_OPTIONS, steps=1, output=str(tmp_path / "run")), CONFIG, Screen())
    assert threads == [1, 1]
    assert torch.get_num_threads() == 2


def test_the_seed_decides_problems_and_model(tmp_path, tokenizer):
    first, same, other = (demo.demo_model(tokenizer, seed).lm_head.weight for seed in (0, 0, 1))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_what_the_demo_promises(tokenizer):
    model = demo.demo_model(tokenizer, 0)
    config = GrassConfig()
    assert model.config.num_hidden_layers >= 6
    assert config.active_layers == 2
    assert demo.DEMO_OPTIONS.steps - config.probe_steps >= 1500
    assert 0.4e6 < sum(p.numel() for p in model.parameters()) < 1e6
    longest = demo.CONTEXT - demo.DEMO_OPTIONS.max_new_tokens
    for problem in demo.word_problems(2000, 1, 0)[0]:
        assert len(tokenizer(problem.question)["input_ids"]) <= longest


def test_the_written_problems_are_a_data_set_of_their_own(tmp_path):
    options = replace(demo.DEMO_OPTIONS, steps=1, batch_size=4, eval_answers=2, output=str(tmp_path / "run"))
    start_run(options, CONFIG, Screen())
    for name, count in (("train", 40), ("heldout", 6)):
        lines = (tmp_path / "run" / "data" / f"{name}.jsonl").read_text().splitlines()
        assert [set(json.loads(line)) for line in lines] == [{"instruction", "output", "answer"}] * count
