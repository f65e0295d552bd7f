"""The whole job on a tiny model.

Would catch: a run that, stopped and resumed, ends in other weights, other draws or doubled rows; frozen layers
that changed; a result that `from_pretrained` cannot load; rows that do not fit the schedule; an input
checked only after something was written; data that changed under a stopped run.
"""

import json
import re
import shutil
import signal
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from grass import ConfigError, DataError, GrassConfig, LayerDiscoveryError, RunFolderError
from grass.errors import ModelError
from grass.finetune import training
from grass.finetune.job import resume_run, start_run
from grass.finetune.options import FinetuneOptions
from grass.finetune.recording import Recorder
from grass.finetune.run_folder import RunFolder, read_rows
from grass.finetune.screen import Screen, quiet_libraries
from grass.finetune.stopping import Stopped, StopRequest

CONFIG = GrassConfig(active_layers=1, probe_steps=3, sample_interval=4, update_interval=8, seed=5)


@pytest.fixture(autouse=True)
def quiet():
    # The libraries' own warnings are not ours to fail on.
    with quiet_libraries():
        yield


@pytest.fixture
def options(tiny_model, problem_files, tmp_path):
    return FinetuneOptions(
        model=str(tiny_model),
        data=str(problem_files[0]),
        eval=str(problem_files[1]),
        template="plain",
        steps=19,
        batch_size=4,
        gradient_accumulation=2,
        lr=1e-2,
        log_steps=4,
        save_steps=8,
        eval_steps=10,
        max_new_tokens=4,
        output=str(tmp_path / "run"),
    )


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder / "model").state_dict()


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def stop_after(monkeypatch, step, how):
    """Do something at the end of a step, once."""
    original = Recorder.on_step_end

    def on_step_end(self, args, state, control, **context):
        if state.global_step == step:
            monkeypatch.setattr(Recorder, "on_step_end", original)
            how()
        return original(self, args, state, control, **context)

    monkeypatch.setattr(Recorder, "on_step_end", on_step_end)


def press_ctrl_c():
    signal.raise_signal(signal.SIGINT)


def crash():
    raise RuntimeError("out of memory, say")


def test_a_run_leaves_everything_behind(options, tmp_path, tiny_model, problem_files, capsys):
    results = start_run(options, CONFIG, Screen(), ["grass", "finetune"])
    folder = RunFolder.open(tmp_path / "run")
    assert folder.state == "finished"
    assert folder.record["options"]["lr"] == 1e-2
    assert folder.record["config"]["sample_interval"] == 4
    assert json.loads(folder.results.read_text()) == results

    before, after = AutoModelForCausalLM.from_pretrained(tiny_model).state_dict(), weights(folder.path)
    AutoTokenizer.from_pretrained(folder.model)
    drawn = {i for i, n in enumerate(results["draw_counts"]) if n}
    rows = read_rows(folder.layers)
    trained = {i for row in rows if row["step"] < 19 for i in row["active"]}
    assert trained == drawn
    for name, weight in after.items():
        layer = int(name.split(".")[2]) if ".layers." in name else None
        assert torch.equal(weight, before[name]) == (layer is not None and layer not in trained), name

    # probe 3; draws at 3 and one step before each period's end; refreshes every 8; switches every 4
    assert [r["step"] for r in rows if "draw" in r["events"]] == [3, 6, 10, 14, 18]
    assert [r["step"] for r in rows if "refresh" in r["events"]] == [3, 10, 18]
    assert {r["step"] for r in rows if "switch" in r["events"]} <= {3, 7, 11, 15, 19}
    assert rows[0]["phase"] == "probe"
    assert rows[0]["active"] == []
    for row in rows[1:]:
        assert len(row["active"]) == 1
        assert sum(row["probabilities"]) == pytest.approx(1)
        assert len(row["importance"]) == 4
    assert sum(results["draw_counts"]) == 4, "the last set was drawn ahead, and never trained"
    total = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(folder.model).parameters())
    block = sum(weight.numel() for name, weight in after.items() if ".layers.0." in name)
    assert results["trained_share"] == pytest.approx((total - 3 * block) / total)

    metrics = read_rows(folder.metrics)
    assert [r["step"] for r in metrics if "lr" in r] == [4, 8, 12, 16, 19]
    assert all(r["grad_norm"] > 1e-3 and r["tokens_per_second"] > 0 for r in metrics if "lr" in r)
    assert [r["step"] for r in metrics if "heldout_loss" in r] == [0, 10, 19]
    assert results["heldout_loss_after"] < results["heldout_loss_before"]
    answers = read_rows(folder.path / "answers.jsonl")
    assert [row["when"] for row in answers] == ["before"] * 8 + ["after"] * 8
    assert [set(row) for row in answers] == [
        {"when", "source", "question", "prompt", "expected", "generated", "rule", "correct"}
    ] * 16
    assert results["answers"] == 8
    assert results["samples"] == [
        {
            "question": b["question"],
            "expected": b["expected"],
            "before": a["generated"],
            "after": b["generated"],
        }
        for a, b in zip(answers[:3], answers[8:11], strict=True)
    ]
    questions = [
        json.loads(line)["instruction"].split()[0] for line in problem_files[1].read_text().splitlines()
    ]
    assert [row["prompt"].split()[1] for row in answers[8:]] == questions  # <s> comes first
    assert results["scoring"] == {"number": 8}
    assert "held-out answers are scored by these rules: number (8)" in capsys.readouterr().err
    assert folder.picture.read_bytes().startswith(b"\x89PNG")
    assert not folder.checkpoints.exists()


@pytest.mark.parametrize(
    ("how", "step", "raised"),
    [(press_ctrl_c, 2, Stopped), (press_ctrl_c, 13, Stopped), (crash, 13, RuntimeError)],
    ids=["ctrl-c in the probe", "ctrl-c", "crash after a checkpoint"],
)
def test_a_stopped_run_ends_like_one_never_stopped(options, tmp_path, monkeypatch, how, step, raised):
    start_run(options, CONFIG, Screen())
    stopped = replace(options, output=str(tmp_path / "stopped"))
    stop_after(monkeypatch, step, how)
    with pytest.raises(raised) as caught:
        start_run(stopped, CONFIG, Screen())
    folder = RunFolder.open(tmp_path / "stopped")
    if raised is Stopped:
        assert str(caught.value).startswith(f"stopped after step {step} of 19; continue with: grass finetune")
        assert folder.state == "stopped"
        assert folder.last_checkpoint().name == f"checkpoint-{step}"
    else:
        assert folder.last_checkpoint().name == "checkpoint-8"
    torch.manual_seed(99)  # the resuming process starts from other random numbers
    began = []
    original = Recorder.on_train_begin

    def on_train_begin(self, args, state, control, **context):
        began.append(state.global_step)
        return original(self, args, state, control, **context)

    monkeypatch.setattr(Recorder, "on_train_begin", on_train_begin)
    results = resume_run(folder.path, Screen())
    assert began == [step if raised is Stopped else 8]  # not from the beginning, which would end alike
    assert_same(weights(folder.path), weights(tmp_path / "run"))
    assert read_rows(folder.layers) == read_rows(tmp_path / "run" / "layers.jsonl")

    def losses(path):
        return [(r["step"], r["lr"]) for r in read_rows(path / "metrics.jsonl") if "lr" in r]

    assert losses(folder.path) == losses(tmp_path / "run")
    whole = json.loads((tmp_path / "run" / "results.json").read_text())
    for name in ("heldout_loss_before", "heldout_loss_after", "trained_share", "draw_counts"):
        assert results[name] == whole[name]
    with pytest.raises(RunFolderError, match="is finished"):
        resume_run(folder.path, Screen())


def test_stopped_in_the_last_evaluation_only_evaluates_again(options, tmp_path, monkeypatch):
    from grass.finetune import job

    original = job.evaluate

    def evaluate(run, options, screen, title):
        if "after" in title:
            raise KeyboardInterrupt
        return original(run, options, screen, title)

    monkeypatch.setattr(job, "evaluate", evaluate)
    with pytest.raises(Stopped, match="continue with"):
        start_run(options, CONFIG, Screen())
    monkeypatch.setattr(job, "evaluate", original)
    folder = RunFolder.open(tmp_path / "run")
    assert folder.state == "trained"
    trained = weights(folder.path)
    monkeypatch.setattr(job, "train", pytest.fail)
    assert resume_run(folder.path, Screen())["heldout_loss_after"] > 0
    assert_same(weights(folder.path), trained)


@pytest.mark.parametrize(("method", "sampler"), [("full", "adaptive"), ("grass", "uniform")])
def test_other_methods(options, tmp_path, method, sampler):
    quick = replace(options, method=method, steps=5, eval="", save_steps=0)
    results = start_run(quick, replace(CONFIG, sampler=sampler), Screen())
    rows = read_rows(tmp_path / "run" / "layers.jsonl")
    if method == "full":
        assert (results["trained_share"], results["draw_counts"], rows) == (1.0, None, [])
        total = results["num_params"]
        assert results["optimizer_state_bytes"] >= 8 * total
    else:
        assert rows[0]["events"] == ["start", "draw", "switch"]  # no probe
        assert rows[0]["phase"] == "adapt"
    assert results["heldout_loss_after"] is None


def test_updates_inside_backward_end_like_those_after_it(options, tmp_path, monkeypatch):
    """With micro-batches, states in the store, and activations computed again, in layers that train part by part."""
    plain = replace(options, max_grad_norm=0.0, activation_checkpointing=True)
    fused = replace(plain, output=str(tmp_path / "fused"))
    asked = []
    original = training.checkpoint_activations

    def checkpoint_activations(model, layers):
        asked.append(layers is not None)
        original(model, layers)

    monkeypatch.setattr(training, "checkpoint_activations", checkpoint_activations)
    start_run(plain, CONFIG, Screen())
    start_run(fused, replace(CONFIG, offload="streamed", fused_backward=True), Screen())
    assert asked == [False, True]
    assert_same(weights(tmp_path / "run"), weights(tmp_path / "fused"))


def test_bad_input_is_told_before_anything_is_written(options, tmp_path, tokenizer):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "1 + 1"}\n{"text"\n')
    empty = tmp_path / "empty-model"
    empty.mkdir()
    cases = [
        (replace(options, data=str(bad)), CONFIG, DataError, r"bad\.jsonl:2: not valid JSON"),
        (replace(options, eval=str(tmp_path / "no.jsonl")), CONFIG, DataError, "no such file"),
        (replace(options, model=str(tmp_path / "none")), CONFIG, ConfigError, "no such folder"),
        (replace(options, model=str(empty)), CONFIG, ConfigError, "not a folder with a config.json"),
        (replace(options, context=100), CONFIG, ConfigError, "the model has 64 positions"),
        (options, replace(CONFIG, active_layers=9), ConfigError, "active_layers is 9, but only 4"),
        (replace(options, pattern="model.none.*"), CONFIG, LayerDiscoveryError, "model.none"),
        (
            replace(options, model="", data="", eval=""),
            replace(CONFIG, active_layers=9),
            ConfigError,
            "only 6",
        ),
    ]
    for chosen, config, error, says in cases:
        with pytest.raises(error, match=says):
            start_run(chosen, config, Screen())
        assert not (tmp_path / "run").exists()


def test_a_model_of_no_use_is_told_before_the_data_is_read(options, tmp_path, tokenizer, monkeypatch):
    from grass.finetune import preparation

    (tmp_path / "config.json").write_text('{"model_type": "bert", "architectures": ["BertForMaskedLM"]}')
    tokenizer.save_pretrained(tmp_path)
    monkeypatch.setattr(preparation, "read_records", pytest.fail)
    with pytest.raises(ModelError, match="BertForMaskedLM"):
        start_run(replace(options, model=str(tmp_path)), CONFIG, Screen())


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt"])
def test_a_damaged_checkpoint_is_named_with_the_remedy(options, tmp_path, monkeypatch, file):
    stop_after(monkeypatch, 2, press_ctrl_c)
    with pytest.raises(Stopped):
        start_run(options, CONFIG, Screen())
    damaged = tmp_path / "run" / "checkpoints" / "checkpoint-2" / file
    damaged.write_bytes(damaged.read_bytes()[:100])
    with pytest.raises(
        RunFolderError, match=r"checkpoint-2 cannot be loaded: .*; remove that folder and resume"
    ):
        resume_run(tmp_path / "run", Screen())
    shutil.rmtree(damaged.parent)
    assert resume_run(tmp_path / "run", Screen())["steps"] == 19


def test_changed_data_is_not_resumed(options, tmp_path, problem_files, monkeypatch):
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(problem_files[0].read_bytes())
    stop_after(monkeypatch, 2, press_ctrl_c)
    with pytest.raises(Stopped):
        start_run(replace(options, data=str(copy)), CONFIG, Screen())
    with copy.open("a") as file:
        file.write('{"text": "1 + 1 = 3"}\n')
    with pytest.raises(RunFolderError, match=r"copy\.jsonl has changed since the run began"):
        resume_run(tmp_path / "run", Screen())


def test_cut_texts_and_shared_records_are_told(options, problem_files, capsys):
    start_run(
        replace(options, context=24, eval=str(problem_files[0]), steps=1, eval_answers=3), CONFIG, Screen()
    )
    shown = capsys.readouterr().err
    assert re.search(r"of 48 training texts \(.*%\) are longer than 24 tokens and are truncated", shown)
    assert "warning: 48 held-out records are also among the training records" in shown


def test_steps_follow_from_epochs(options):
    epochs = replace(options, steps=None, epochs=2.0)
    assert training.count_steps(epochs, num_examples=48) == 2 * 6
    assert training.count_steps(epochs, num_examples=49) == 2 * 7
    assert training.count_steps(replace(epochs, epochs=0.01), num_examples=49) == 1


def test_a_second_request_interrupts_at_once():
    said = []
    request = StopRequest()
    before = signal.getsignal(signal.SIGINT)
    with request.on_signals(said.append):
        press_ctrl_c()
        assert request.requested
        with pytest.raises(KeyboardInterrupt):
            press_ctrl_c()
    assert len(said) == 1
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(("steps", "probe"), [(20, 5), (3, 1), (2, 1)])
def test_a_run_no_longer_than_the_probe_trains_all_the_same(options, tmp_path, capsys, steps, probe):
    """With the default probe of 20 steps: it was saved as it had been."""
    config = replace(CONFIG, probe_steps=20)
    start_run(replace(options, steps=steps, eval_steps=0), config, Screen())
    assert f"the probe is shortened from 20 to {probe} of {steps} steps" in capsys.readouterr().err
    before = AutoModelForCausalLM.from_pretrained(options.model).state_dict()
    after = weights(tmp_path / "run")
    assert any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("chunked", ["full", "chunked"])
def test_the_learning_rate_waits_for_the_end_of_the_probe(options, tmp_path, chunked):
    options = replace(options, steps=12, log_steps=1, scheduler="linear", eval_steps=0, loss=chunked)
    start_run(options, CONFIG, Screen())
    rates = [row["lr"] for row in read_rows(tmp_path / "run" / "metrics.jsonl") if "lr" in row]
    peak = options.lr
    assert rates == pytest.approx([peak] * 3 + [peak * (1 - k / 9) for k in range(9)])


def test_methods_without_a_probe_keep_the_schedule(options, tmp_path):
    options = replace(options, steps=8, log_steps=1, eval_steps=0)
    start_run(options, replace(CONFIG, sampler="uniform"), Screen())
    rates = [row["lr"] for row in read_rows(tmp_path / "run" / "metrics.jsonl") if "lr" in row]
    assert rates == pytest.approx([options.lr * (1 - k / 8) for k in range(8)])


def change(folder, options):
    """By how much each weight has changed, as float32, and the share of the weights that have changed at all."""
    before = AutoModelForCausalLM.from_pretrained(options.model).state_dict()
    after = weights(folder)
    moved = {name: after[name].float() - before[name].float() for name in before}
    trained = [d for d in moved.values() if bool(d.any())]
    return moved, sum(int((d != 0).sum()) for d in trained) / sum(d.numel() for d in trained)


def bfloat16_copy(options, folder):
    """The options with the model in bfloat16, so that both dtypes begin with the same weights."""
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(options.model).save_pretrained(folder)
    return replace(options, model=str(folder))


@pytest.mark.parametrize("method", ["grass", "full"])
def test_bfloat16_trains_as_float32_does(options, tmp_path, method, capsys):
    """At a usual learning rate most updates are less than a bfloat16 can hold: only 1.7 % of the weights changed."""
    options = bfloat16_copy(options, tmp_path / "model")
    options = replace(
        options, lr=1e-5, steps=40, eval_steps=0, save_steps=0, method=method, scheduler="constant"
    )
    config = replace(CONFIG, active_layers=4)
    found = {}
    for name, changes in {
        "float32": {"dtype": "float32"},
        "master": {},
        "stochastic": {"rounding": "stochastic"},
        "nearest": {"rounding": "nearest"},
    }.items():
        folder = tmp_path / name
        start_run(replace(options, output=str(folder), **changes), config, Screen())
        found[name] = change(folder, options)
        assert ("loses small updates of bfloat16" in capsys.readouterr().err) == (name == "nearest")
    assert found["float32"][1] > 0.95
    assert found["nearest"][1] < 0.5 * found["stochastic"][1]
    total = {name: torch.cat([d.flatten() for d in moved.values()]) for name, (moved, _) in found.items()}
    # What is saved is the nearest bfloat16, so a single weight is not near; along the update of float32 it is.
    direction = total["float32"] / total["float32"].norm() ** 2
    assert total["master"] @ direction == pytest.approx(1, abs=0.1)
    assert total["stochastic"] @ direction == pytest.approx(1, abs=0.15)
    assert total["nearest"] @ direction < 0.9
