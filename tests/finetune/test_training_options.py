"""Options of training that SFTTrainer brings, in whole runs.

Would catch: the last weights kept where the best were asked for; checkpoints that are removed though they were to stay;
metrics that never reach the loggers; packed rows counted as texts; a base template saved with a model that was
trained with another; a packed or best run that is not bitwise the same after a stop; pieces of long texts lost.
"""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

from grass import ConfigError, GrassConfig
from grass.cli import main
from grass.errors import ModelError
from grass.finetune import training
from grass.finetune.job import resume_run, start_run
from grass.finetune.options import FinetuneOptions
from grass.finetune.preparation import prepare
from grass.finetune.recording import Recorder
from grass.finetune.run_folder import read_rows
from grass.finetune.screen import Screen, quiet_libraries
from grass.finetune.stopping import Stopped
from grass.finetune.summary import format_table

CONFIG = GrassConfig(active_layers=1, probe_steps=2, sample_interval=2, update_interval=4, seed=5)


@pytest.fixture(autouse=True)
def quiet():
    with quiet_libraries():
        yield


@pytest.fixture
def options(tiny_model, problem_files, tmp_path):
    return FinetuneOptions(
        model=str(tiny_model),
        data=str(problem_files[0]),
        eval=str(problem_files[1]),
        template="plain",
        steps=12,
        batch_size=4,
        lr=1e-2,
        log_steps=4,
        save_steps=0,
        eval_answers=2,
        max_new_tokens=4,
        output=str(tmp_path / "run"),
    )


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


BEST = {
    "load_best": True,
    "save_steps": 4,
    "lr": 1.0,
    "scheduler": "constant",
}  # a rate at which the loss goes up


@pytest.mark.parametrize("lr", [1e-2, BEST["lr"]])
def test_the_best_checkpoint_is_kept(options, tmp_path, lr):
    results = start_run(replace(options, **{**BEST, "lr": lr}, save_total_limit=9), CONFIG, Screen())
    rows = [
        r for r in read_rows(tmp_path / "run" / "metrics.jsonl") if "heldout_loss" in r and "when" not in r
    ]
    losses = {row["step"]: row["heldout_loss"] for row in rows}
    assert list(losses) == [4, 8, 12]
    best = results["best_step"]
    assert losses[best] == min(losses.values())
    assert results["heldout_loss_after"] == pytest.approx(losses[best])
    assert (best == 12) == (lr < 0.1)  # else nothing is shown
    folder = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-12", "checkpoint-4", "checkpoint-8"]
    for step in losses:
        assert equal(weights(tmp_path / "run" / "model"), weights(folder / f"checkpoint-{step}")) == (
            step == best
        )


def test_the_best_of_a_stopped_run_is_that_of_a_whole_one(options, tmp_path, monkeypatch):
    whole = start_run(replace(options, **BEST, output=str(tmp_path / "whole")), CONFIG, Screen())
    assert not (tmp_path / "whole" / "checkpoints").exists()
    begin = Recorder.on_step_end

    def stop(self, args, state, control, **context):
        self.stop.requested = state.global_step == 9
        return begin(self, args, state, control, **context)

    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "on_step_end", stop)
        with pytest.raises(Stopped):
            start_run(replace(options, **BEST), CONFIG, Screen())
    resumed = resume_run(tmp_path / "run", Screen())
    assert resumed["best_step"] == whole["best_step"]
    assert equal(weights(tmp_path / "run" / "model"), weights(tmp_path / "whole" / "model"))


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"eval": ""}, "needs held-out records"),
        ({"eval_steps": 2}, "leave out --eval-steps"),
        ({"save_steps": 0}, "--save-steps of at least 1"),
    ],
)
def test_the_best_needs_something_to_compare(options, wrong, says):
    with pytest.raises(ConfigError, match=says):
        replace(options, **{**BEST, **wrong})


def test_metrics_reach_tensorboard(options, tmp_path):
    start_run(replace(options, report_to="tensorboard", eval_steps=4), CONFIG, Screen())
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    scalars = events.Tags()["scalars"]
    for name in ("train/loss", "eval/loss", "train/grass/entropy", "train/grass/importance/model.layers.3"):
        assert name in scalars
    rows = {r["step"]: r["loss"] for r in read_rows(tmp_path / "run" / "metrics.jsonl") if "loss" in r}
    assert {e.step: e.value for e in events.Scalars("train/loss")} == pytest.approx(rows, rel=1e-6)


def test_an_unknown_logger_is_refused_before_anything_is_written(options, tmp_path):
    with pytest.raises(ConfigError, match=r"report_to .*tensorbord.*did you mean tensorboard"):
        start_run(replace(options, report_to="tensorbord"), CONFIG, Screen())
    with pytest.raises(ConfigError, match="needs the package comet_ml"):
        start_run(replace(options, report_to=("tensorboard", "comet_ml")), CONFIG, Screen())
    assert not (tmp_path / "run").exists()


def test_packed_rows_are_counted_and_resumed(options, tmp_path, monkeypatch, capsys):
    packed = replace(options, packing=True, context=64, batch_size=2, steps=None, epochs=2.0)
    run = prepare(packed, CONFIG, Screen())
    assert all(sum(lengths) <= 64 for lengths in run.dataset["seq_lengths"])
    assert sum(map(len, run.dataset["seq_lengths"])) == 48
    assert f"48 texts are packed into {len(run.dataset)} rows" in capsys.readouterr().err
    whole = start_run(replace(packed, output=str(tmp_path / "whole")), CONFIG, Screen())
    assert whole["steps"] == training.count_steps(packed, len(run.dataset)) == 2 * -(-len(run.dataset) // 2)
    assert whole["heldout_loss_after"] < whole["heldout_loss_before"]
    begin = Recorder.on_step_end

    def stop(self, args, state, control, **context):
        self.stop.requested = state.global_step == 5
        return begin(self, args, state, control, **context)

    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "on_step_end", stop)
        with pytest.raises(Stopped):
            start_run(packed, CONFIG, Screen())
    resume_run(tmp_path / "run", Screen())
    assert equal(weights(tmp_path / "run" / "model"), weights(tmp_path / "whole" / "model"))


def test_the_template_of_training_is_saved_with_the_model(options, tmp_path, tiny_model, capsys):
    assert AutoTokenizer.from_pretrained(tiny_model).chat_template is None
    start_run(replace(options, template="auto", steps=3), CONFIG, Screen())
    assert (
        "template alpaca as the model has no chat template; it is saved with the model"
        in capsys.readouterr().err
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    asked = tokenizer.apply_chat_template([{"role": "user", "content": "Ada"}], tokenize=False)
    assert asked.endswith("### Instruction:\nAda\n\n### Response:\n")


def test_samples_without_an_answer_are_not_scored(options, tmp_path):
    rows = [json.loads(line) for line in Path(options.eval).read_text().splitlines()]
    path = tmp_path / "chats.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": r["instruction"], "completion": r["output"]}) + "\n" for r in rows)
    )
    results = start_run(replace(options, eval=str(path), eval_answers=200), CONFIG, Screen())
    assert results["accuracy_after"] is None
    assert [sample["expected"] for sample in results["samples"]] == [row["output"] for row in rows[:3]]
    assert all(sample.keys() == {"question", "expected", "before", "after"} for sample in results["samples"])


def test_the_number_of_heldout_records_is_limited(options, capsys):
    run = prepare(replace(options, eval_limit=3, eval_answers=9), CONFIG, Screen())
    assert len(run.heldout) == len(run.questions) == 3
    assert "3 of 8 held-out records are used" in capsys.readouterr().err


def test_long_texts_are_told_and_learnt(options, tmp_path, capsys):
    path = tmp_path / "text.jsonl"
    path.write_text(json.dumps({"text": "1 + 1 = 2 " * 20}) + "\n")
    run = prepare(replace(options, data=str(path), eval="", context=16), CONFIG, Screen())
    assert sum(map(len, run.dataset["input_ids"])) == 2 + 5 * 20
    assert (
        "1 of 1 training texts (100.0%) are longer than 16 tokens and are divided" in capsys.readouterr().err
    )


def test_loggers_change_nothing(options, tmp_path):
    best = replace(options, **BEST)
    config = replace(CONFIG, probe_steps=6)
    without = start_run(best, config, Screen())
    logged = replace(best, report_to="tensorboard", output=str(tmp_path / "logged"))
    assert start_run(logged, config, Screen())["best_step"] == without["best_step"]
    assert equal(weights(tmp_path / "run" / "model"), weights(tmp_path / "logged" / "model"))


def test_ctrl_c_long_after_the_best_keeps_the_newest_checkpoint(options, tmp_path, monkeypatch):
    begin = Recorder.on_step_end

    def stop(self, args, state, control, **context):
        self.stop.requested = state.global_step == 11
        return begin(self, args, state, control, **context)

    monkeypatch.setattr(Recorder, "on_step_end", stop)
    with pytest.raises(Stopped):
        start_run(replace(options, **{**BEST, "save_steps": 2}), CONFIG, Screen())
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert "checkpoint-11" in kept
    assert len(kept) == 2


def test_generation_stops_where_a_reply_ends(options, tmp_path, tiny_model, capsys):
    """A base model whose template ends replies by another token than its EOS."""
    folder = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(tiny_model).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<unk>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }} {% if m.role == 'assistant' %}<unk>{% endif %}{% endfor %}"
    )
    tokenizer.save_pretrained(folder)
    start_run(replace(options, model=str(folder), template="auto", steps=3), CONFIG, Screen())
    assert "generation stops at <unk>, which ends a reply" in capsys.readouterr().err
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").generation_config.eos_token_id
    assert set(saved) == {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<unk>")}


def test_accuracy_is_told_by_file(options, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text(Path(options.eval).read_text().splitlines()[0] + "\n")
    results = start_run(replace(options, eval=(options.eval, str(other)), eval_answers=200), CONFIG, Screen())
    assert results["accuracy_by_source_after"].keys() == {options.eval, str(other)}
    rows = [row for row in read_rows(tmp_path / "run" / "answers.jsonl") if row["when"] == "after"]
    for source, accuracy in results["accuracy_by_source_after"].items():
        correct = [row["correct"] for row in rows if row["source"] == source]
        assert accuracy == sum(correct) / len(correct)
    assert str(other)[-20:] in format_table(results)


@pytest.mark.parametrize(
    ("wrong", "error", "says"),
    [
        ({"revision": "v2"}, ConfigError, "is a folder: only models on the hub"),
        ({"eval_limit": 3, "eval": ""}, ConfigError, "--eval-limit needs held-out records"),
    ],
)
def test_options_that_would_have_no_effect_are_refused(options, wrong, error, says):
    with pytest.raises(error, match=says):
        prepare(replace(options, **wrong), CONFIG, Screen())


def test_options_without_effect_are_told(options, tmp_path, capsys):
    path = tmp_path / "text.jsonl"
    path.write_text(json.dumps({"text": "1 + 1 = 2"}) + "\n")
    prepare(replace(options, data=str(path), eval="", rounding="stochastic"), CONFIG, Screen())
    shown = capsys.readouterr().err
    assert "all records are plain texts: --template has no effect" in shown
    assert "no weights are bfloat16: --rounding has no effect" in shown


def test_a_model_without_tokenizer_is_told(options, tmp_path, tiny_model):
    AutoModelForCausalLM.from_pretrained(tiny_model).save_pretrained(tmp_path / "bare")
    with pytest.raises(ModelError, match="no tokenizer in the folder"):
        prepare(replace(options, model=str(tmp_path / "bare")), CONFIG, Screen())


def test_code_of_a_model_is_run_only_where_it_is_trusted(options, tmp_path, tiny_model, monkeypatch, capsys):
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.path", [*sys.path])
    folder = shutil.copytree(tiny_model, tmp_path / "own")
    (folder / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "architectures": ["OwnForCausalLM"]}
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config))
    options = replace(options, model=str(folder), steps=3)
    with pytest.raises(ModelError, match="code of its own: pass --trust-remote-code if you trust it"):
        start_run(options, CONFIG, Screen())
    trusting = replace(options, trust_remote_code=True)

    def stop(*args, **how):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("grass.finetune.job.samples", stop)  # trained, and not yet finished
        with pytest.raises(Stopped):
            start_run(trusting, CONFIG, Screen())
    resume_run(tmp_path / "run", Screen())
    assert main(["chat", str(tmp_path / "run"), "--prompt", "Ada", "--max-new-tokens", "2"]) == 0
    assert main(["chat", str(tmp_path / "run" / "model"), "--prompt", "Ada"]) == 1
    assert "--trust-remote-code" in capsys.readouterr().err
