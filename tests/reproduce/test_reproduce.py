"""`grass reproduce` on a tiny model.

Would catch: a method that trains nothing, something else, or other parameters than it names; a run that differs when it
is repeated; a rate chosen on test records; a stopped study that starts again; a table with wrong averages; errors that
come after the first runs.
"""

import json
import re
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean, stdev

import pytest
import torch

from grass.cli import main
from grass.config import GrassConfig
from grass.errors import ConfigError
from grass.finetune.loss import IGNORED
from grass.finetune.model import load_model
from grass.finetune.run_folder import read_rows, write_rows
from grass.reproduce import training
from grass.reproduce.methods import METHODS, full
from grass.reproduce.options import SEARCH_SEED, ReproduceOptions
from grass.reproduce.preparation import check_methods, prepare
from grass.reproduce.report import format_report, make_report
from grass.reproduce.study import Job
from grass.reproduce.training import batches, curve_of, run_job, schedule, train_step

CONFIG = GrassConfig(active_layers=1, probe_steps=2, sample_interval=2, update_interval=2)
QUICK = (
    "--steps 6 --batch-size 4 --template plain --eval-limit 3 --validation 6 --max-new-tokens 4 --context 64 "
    "--threads 1 --active-layers 1 --probe-steps 2 --sample-interval 2 --update-interval 2 "
    "--rates 1e-3,2e-3,4e-3 --seeds 2"
)


@pytest.fixture
def options(tiny_model, data_dir, tmp_path):
    return ReproduceOptions(
        model=str(tiny_model),
        data_dir=str(data_dir),
        methods=("uniform", "full"),
        seeds=2,
        rates=("1e-3", "2e-3", "4e-3"),
        steps=6,
        batch_size=4,
        context=64,
        template="plain",
        validation=6,
        eval_limit=3,
        max_new_tokens=4,
        threads=1,
        output=str(tmp_path / "out"),
    )


def changed(model, before):
    return {
        name for name, p in model.named_parameters() if name in before and not torch.equal(p, before[name])
    }


@pytest.mark.parametrize("name", sorted(METHODS))
def test_each_method_trains_what_it_names(name, tiny_model):
    model, _ = load_model(str(tiny_model))
    if name == "galore":
        pytest.importorskip("galore_torch", reason="GaLore is optional")
    before = {key: value.clone() for key, value in model.named_parameters()}
    config = replace(CONFIG, sample_interval=100, update_interval=100, seed=1)
    optimizer = METHODS[name](model, config)
    ids = torch.randint(0, 100, (2, 8))
    for _ in range(4):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = changed(model, before)
    layers = {match[1] for key in moved if (match := re.search(r"layers\.(\d+)\.", key))}
    outside = {key for key in moved if "layers" not in key}
    if "lora" in name or "dora" in name:
        assert not moved
        adapters = {key: p for key, p in model.named_parameters() if p.requires_grad}
        assert all(p.ne(0).any() for key, p in adapters.items() if "lora_B" in key)  # zero at first
        rank = int(name.split("-r")[1])
        assert all(
            rank in p.shape for key, p in adapters.items() if "lora_" in key and "magnitude" not in key
        )
        assert any("magnitude" in key for key in adapters) == ("dora" in name)
    elif name in ("full", "galore"):
        assert layers == {"0", "1", "2", "3"}
        assert outside
    else:
        assert bool(outside) != name.endswith("inside")
        if name.startswith("modules"):
            units = {key.split(".")[3] for key in moved if "layers" in key and "norm" not in key}
            assert units
            assert units <= {"self_attn", "mlp"}
            inside = {tuple(key.split(".")[2:4]) for key in moved if "layers" in key and "norm" not in key}
            assert len(inside) == 2
        else:
            assert len(layers) == 1


@pytest.mark.parametrize(
    ("name", "sampler", "moments"),
    [
        ("lisa", "uniform", "reset"),
        ("uniform", "uniform", "keep"),
        ("badam", "cyclic", "reset"),
        ("cyclic", "cyclic", "keep"),
        ("static", "static", "keep"),
        ("grass", "adaptive", "keep"),
        ("shuffled", "shuffled", "keep"),
        ("weight-norm", "weight_norm", "keep"),
    ],
)
def test_layer_methods_sample_and_keep_moments_as_they_say(name, sampler, moments, tiny_model):
    model, _ = load_model(str(tiny_model))
    config = METHODS[name](model, CONFIG)._scheduler.config
    assert (config.sampler, config.moments) == (sampler, moments)


def test_a_run_is_repeated_bit_by_bit_and_a_search_sees_no_test_record(options, data_dir):
    run = partial(run_job, options, CONFIG, {"commit": "abc"})
    job = Job("arithmetic", "grass", 1e-3, options.base, 0)
    first, again = run(job), run(job)
    assert first["log_losses"] == again["log_losses"]
    assert set(first["accuracies"]) == {"AddSub", "gsm8k"}
    assert first["log_loss"] == mean(first["log_losses"].values())
    assert sum(first["draw_counts"]) > 0
    assert first["commit"] == "abc"
    other = run(replace(job, order=1))
    assert other["curve"] != first["curve"]
    search = run(replace(job, order=SEARCH_SEED))
    assert "accuracies" not in search
    path = data_dir / "AddSub" / "test.json"
    path.write_text(path.read_text().replace("=", "is"))
    prepare.cache_clear()
    assert run(replace(job, order=SEARCH_SEED))["log_loss"] == search["log_loss"]
    assert run(job)["log_losses"]["AddSub"] != first["log_losses"]["AddSub"]


def test_the_rate_is_zero_in_the_probe_and_rises_after_it(options, monkeypatch):
    rates = []
    monkeypatch.setattr(training, "set_lr", lambda optimizer, lr: rates.append((optimizer.phase, lr)))
    settings = replace(options, steps=40)
    run_job(settings, replace(CONFIG, probe_steps=8), {}, Job("arithmetic", "grass", 1.0, options.base, 0))
    probe = [lr for phase, lr in rates if phase == "probe"]
    adapt = [lr for phase, lr in rates if phase == "adapt"]
    assert len(probe) == 8
    assert set(probe) == {0.0}
    assert adapt == [schedule(step, 32) for step in range(32)]


def test_activations_are_recomputed_if_asked_for(options, monkeypatch):
    calls = []
    monkeypatch.setattr(training, "evaluate", lambda *args, **kwargs: {"log_loss": 1.0})
    original = training.load_model

    def load(*args, **options):
        model, tokenizer = original(*args, **options)
        model.model.layers[3].self_attn.q_proj.register_forward_pre_hook(lambda *_: calls.append(1))
        return model, tokenizer

    monkeypatch.setattr(training, "load_model", load)
    counts = []
    for activation_checkpointing in (False, True):
        calls.clear()
        settings = replace(options, activation_checkpointing=activation_checkpointing)
        run_job(settings, CONFIG, {}, Job("arithmetic", "full", 1e-3, options.base, 0))
        counts.append(len(calls))
    assert counts == [options.steps, 2 * options.steps]


def test_a_run_that_diverges_ends_at_once(options, monkeypatch):
    monkeypatch.setattr(training, "train_step", lambda *args, **kwargs: torch.tensor(float("nan")))
    found = run_job(options, CONFIG, {}, Job("arithmetic", "full", 1e-3, options.base, 0))
    assert found["log_loss"] is None
    assert found["steps"] == 1


def test_records_without_an_output_count_for_the_accuracy_only(options, data_dir):
    path = data_dir / "AddSub" / "test.json"
    records = json.loads(path.read_text())
    path.write_text(json.dumps([records[0], *(r | {"output": ""} for r in records[1:])]))
    prepare.cache_clear()
    prepared = prepare(options)
    assert len(prepared.tests["AddSub"]) < len(prepared.questions["AddSub"]) == 3


def test_a_step_is_the_same_in_one_pass_or_several(tiny_model, options):
    """Micro-batches have different numbers of targets: their losses must be sums over tokens, not means of means."""
    results = []
    for size in (None, 1, 2):
        model, _ = load_model(str(tiny_model))
        optimizer = full(model, CONFIG)
        examples = [example(3 + 2 * i) for i in range(4)]
        settings = replace(options, micro_batch_size=size)
        loss = train_step(model, optimizer, examples, settings, 0, chunked=False)
        results.append((float(loss), [p.detach().clone() for p in model.parameters()]))
    for loss, params in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-5)
        for a, b in zip(params, results[0][1], strict=True):
            torch.testing.assert_close(a, b)


def example(length):
    from grass.finetune.encoding import Example

    ids = [5 + i for i in range(length)]
    return Example(ids, [IGNORED, *ids[1:]])


def test_batches_are_every_example_once_an_epoch():
    seen = [item for batch in batches(list(range(10)), 4, 5, seed=3) for item in batch]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]
    assert len(next(batches([1, 2], 5, 1, seed=0))) == 5  # more than there are


def test_a_curve_is_the_mean_of_tenths():
    assert curve_of([1.0, 2.0, 3.0]) == [1.0, 2.0, 3.0]
    assert curve_of([float(i) for i in range(20)])[0] == 0.5


def test_the_command_runs_all_and_goes_on(options, tmp_path, capsys):
    command = ["reproduce", "--model", options.model, "--data-dir", options.data_dir, *QUICK.split()]
    command += ["--methods", "uniform", "--output", str(tmp_path / "out"), "--json"]
    assert main(command) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert "gsm8k: 4 test records, 3 are used; 2 others are among the training records" in captured.err
    assert "tasks of the paper without files: MultiArith, AQuA, SingleEq, SVAMP" in captured.err
    rows = read_rows(tmp_path / "out" / "arithmetic.jsonl")
    own = [row for row in rows if row["order"] < SEARCH_SEED]
    found = report["methods"]["uniform"]
    assert found["runs"] == len(own) == 2
    assert {row["lr"] for row in own} == {found["lr"]}
    averages = [mean(row["accuracies"].values()) for row in own]
    assert found["accuracy"] == pytest.approx(mean(averages))
    assert found["accuracy_deviation"] == pytest.approx(stdev(averages))
    assert main(command) == 0
    assert read_rows(tmp_path / "out" / "arithmetic.jsonl") == rows
    capsys.readouterr()
    assert main([*command, "--steps", "8"]) == 2
    assert "out has runs with --steps 6: pass another --output" in capsys.readouterr().err
    assert main([*command, "--methods", "full", "--minutes", "0"]) == 0
    smaller = [
        "--activation-checkpointing",
        "--micro-batch-size",
        "1",
        "--eval-batch-size",
        "1",
        "--offload",
        "none",
    ]
    assert main([*command, *smaller, "--minutes", "0"]) == 0  # as a run without memory left asks for


def test_nothing_begins_after_the_given_minutes_and_the_table_says_what_is_missing(options, capsys):
    command = ["reproduce", "--model", options.model, "--data-dir", options.data_dir, *QUICK.split()]
    assert main([*command, "--minutes", "0", "--output", options.output]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0] == "arithmetic on tiny; the last 3 columns are the paper's averages"
    grass = next(line.split() for line in table if line.startswith("grass"))
    assert grass == ["grass", "0", "34.22", "60.65", "59.59"]


def test_a_diverged_run_is_counted_and_averages_are_of_the_others(options):
    rows = []
    for lr, loss in ((1e-3, 2.0), (2e-3, 1.0), (4e-3, None)):
        rows.append(
            {
                "task": "arithmetic",
                "method": "full",
                "lr": lr,
                "base": "tiny",
                "order": SEARCH_SEED,
                "log_loss": loss,
            }
        )
    for order, loss in ((0, None), (1, 1.5)):
        row = {
            "task": "arithmetic",
            "method": "full",
            "lr": 2e-3,
            "base": "tiny",
            "order": order,
            "log_loss": loss,
        }
        rows.append(row | ({} if loss is None else {"accuracies": {"AddSub": 0.5, "gsm8k": 0.25}}))
    report = make_report(rows, options)
    found = report["methods"]["full"]
    assert (found["runs"], found["diverged"], found["log_loss"], found["accuracy"]) == (2, 1, 1.5, 0.375)
    text = format_report(report)
    assert "2 (1 diverged)" in text
    assert re.search(r"full .*50\.0 +25\.0 +37\.50 +33\.48", text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--methods grss", "there is no method 'grss' (did you mean grass?); there are full"),
        ("--tasks boolq", "boolq is no task of arithmetic"),
        ("--rates 1e-3,3e-3", "rates must be positive, each twice the one before"),
        ("--rates fast", "rates must be numbers, not 1e-3, 2e-3, 4e-3, fast"),
        ("--batch-size 4 --micro-batch-size 3", "must be a multiple of micro_batch_size"),
        ("--rates nan,nan", "rates must be positive"),
        ("--minutes -1", "minutes must not be negative"),
        ("--sampler uniform", "leave out --sampler: methods differ in it"),
        ("--seed 3", "leave out --seed: methods differ in it, and orders of the data are the seeds"),
        ("--fused-backward --micro-batch-size 2", "leave out --micro-batch-size"),
        ("--methods weight-norm,grss", "there is no method 'grss'"),
        ("--max-new-tokens 60", "pass --max-new-tokens of at most"),
        ("--steps 0", "steps must be at least 1"),
        ("--table science", "table must be"),
        ("--methods grass --active-layers 9", "active_layers"),
        ("--context 5", "are longer than 5 tokens: pass --context"),
        ("--model /nowhere", "no such folder"),
    ],
)
def test_wrong_input_is_one_line_and_nothing_is_written(options, arguments, message, capsys, tmp_path):
    command = ["reproduce", "--model", options.model, "--data-dir", options.data_dir, *QUICK.split()]
    assert main([*command, "--methods", "full", "--output", str(tmp_path / "out"), *arguments.split()]) in (
        1,
        2,
    )
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("grass reproduce: ")
    assert message in error
    assert not read_rows(tmp_path / "out" / "arithmetic.jsonl")


@pytest.mark.parametrize("name", ["model", "data_dir"])
def test_required_arguments_are_named(name):
    given = {"model": "m", "data_dir": "d", name: ""}
    with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')} is required"):
        ReproduceOptions(**given)


def test_a_missing_package_is_named(tiny_model, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "galore_torch", None)
    model, _ = load_model(str(tiny_model))
    with pytest.raises(ConfigError, match="pip install galore-torch bitsandbytes"):
        METHODS["galore"](model, CONFIG)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_can_be_checked_before_the_weights_are_loaded(name, options):
    check_methods(replace(options, methods=(name,)), CONFIG)


def test_float16_is_refused(options, tmp_path):
    config = json.loads((Path(options.model) / "config.json").read_text())
    shutil.copytree(options.model, tmp_path / "half")
    (tmp_path / "half" / "config.json").write_text(json.dumps(config | {"dtype": "float16"}))
    with pytest.raises(ConfigError, match="saved in float16: pass --dtype bfloat16 or float32"):
        check_methods(replace(options, model=str(tmp_path / "half")), CONFIG)
    check_methods(replace(options, model=str(tmp_path / "half"), dtype="float32"), CONFIG)


def test_runs_of_another_model_or_of_other_records_are_not_continued(options, data_dir, tmp_path, capsys):
    command = ["reproduce", "--data-dir", options.data_dir, *QUICK.split(), "--output", str(tmp_path / "out")]
    model = tmp_path / "elsewhere" / "tiny"
    shutil.copytree(options.model, model)
    write_rows(tmp_path / "out" / "arithmetic.jsonl", [])
    assert main([*command, "--model", options.model, "--minutes", "0"]) == 0
    (tmp_path / "out" / "arithmetic.jsonl").write_text(
        json.dumps(
            {"task": "arithmetic", "method": "full", "lr": 1.0, "base": "tiny", "order": 0, "log_loss": 1.0}
        )
        + "\n"
    )
    assert main([*command, "--model", str(model), "--minutes", "0"]) == 2
    assert f"has runs with --model {options.model}: pass another --output" in capsys.readouterr().err
    path = data_dir / "AddSub" / "test.json"
    path.write_text(path.read_text().replace("=", "is"))
    prepare.cache_clear()
    assert main([*command, "--model", options.model, "--minutes", "0"]) == 2
    assert "has runs with other records: pass another --output" in capsys.readouterr().err


def test_rows_of_another_model_do_not_count(options, tmp_path):
    rows = [
        {
            "task": "arithmetic",
            "method": "uniform",
            "lr": lr,
            "base": "other",
            "order": SEARCH_SEED,
            "log_loss": 1.0,
        }
        for lr in (1e-3, 2e-3, 4e-3)
    ]
    write_rows(tmp_path / "rows.jsonl", rows)
    assert make_report(rows, options)["methods"]["uniform"]["lr"] is None
