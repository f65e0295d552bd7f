"""`grass reproduce` on a tiny model.

Would catch: a method that trains nothing, something else, or other parameters than it names; a run that differs when it
is repeated or comes after another one; a rate chosen on test records; a log-loss of wrong outputs; a stopped study that
starts again, or goes on with other settings; a table with wrong averages; errors that come after the first runs.
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
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from grass.cli import main
from grass.config import GrassConfig
from grass.errors import ConfigError, DataError, GrassError
from grass.finetune.loss import IGNORED
from grass.finetune.model import load_model
from grass.finetune.run_folder import read_rows, write_rows
from grass.reproduce import training
from grass.reproduce.job import digest_of, settings_of, weights_of
from grass.reproduce.methods import METHODS, full
from grass.reproduce.options import SEARCH_SEED, ReproduceOptions
from grass.reproduce.preparation import check_methods, prepare
from grass.reproduce.report import format_report, make_report
from grass.reproduce.study import Job
from grass.reproduce.tables import read_table
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
            inside = {key.rsplit(".", 2)[0] for key in moved if "layers" in key and "norm" not in key}
            sizes = {
                f"model.layers.{layer}.{unit}": sum(p.numel() for p in getattr(block, unit).parameters())
                for layer, block in enumerate(model.model.layers)
                for unit in ("self_attn", "mlp")
            }
            budget = sum(p.numel() for p in model.model.layers[0].parameters())
            left = budget - sum(sizes[unit] for unit in inside)
            assert 0 <= left < min(size for unit, size in sizes.items() if unit not in inside)
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


def test_the_rate_does_not_become_negative_after_the_last_step():
    assert schedule(80, 80) == 0.0
    with pytest.raises(ValueError, match="step 81 is after the last of 80 steps"):
        schedule(81, 80)


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


def change(path, *changes):
    """Change the first records of a file, one by each of the changes."""
    records = json.loads(path.read_text())
    path.write_text(json.dumps([*map(dict.__or__, records, changes), *records[len(changes) :]]))


WRONG = {"output": "It is 12345 ."}


def test_outputs_that_are_wrong_count_for_the_accuracy_only(options, data_dir):
    """With a limit of one record, that of the log-loss is drawn of the right ones."""
    change(data_dir / "AddSub" / "test.json", WRONG, WRONG | {"output": ""}, WRONG)
    for limit in (1, 3):
        prepared = prepare(replace(options, eval_limit=limit))
        assert (len(prepared.tests["AddSub"]), len(prepared.questions["AddSub"])) == (1, limit)
        assert prepared.num_wrong == {"AddSub": 2, "gsm8k": 0}
        text = prepared.encoder.tokenizer.decode(prepared.tests["AddSub"][0].input_ids)
        assert "12345" not in text


@pytest.mark.parametrize(
    "output", ["", "It is 12345 .", "40 + 1 " * 40 + "{answer}"], ids=["none", "wrong", "too long"]
)
def test_a_task_of_which_no_log_loss_can_be_computed_is_refused(options, data_dir, output):
    path = data_dir / "AddSub" / "test.json"
    records = json.loads(path.read_text())
    change(path, *({"output": output.format(answer=record["answer"])} for record in records))
    with pytest.raises(DataError, match=r"AddSub/test.json: no record has an output, .*: pass --tasks"):
        prepare(options)


def test_outputs_that_do_not_fit_the_model_are_left_out(options, data_dir):
    path = data_dir / "AddSub" / "test.json"
    answer = json.loads(path.read_text())[0]["answer"]
    change(path, {"output": f"{'40 + 1 ' * 40} {answer}"})
    prepared = prepare(options)
    assert len(prepared.tests["AddSub"]) == 3
    assert prepared.num_wrong["AddSub"] == 0
    assert all(len(example.input_ids) <= 64 for example in prepared.tests["AddSub"])


def test_rates_are_chosen_on_records_within_the_context(options, data_dir):
    """The search is to measure what is trained on."""
    held_out = read_table(data_dir, "arithmetic", (), options.validation).validation
    questions = [record.messages[0].content for record in held_out]
    path = data_dir / "math_data.json"
    records = json.loads(path.read_text())

    def lengthen(questions):
        new = [r | {"output": "40 + 1 " * 40} if r["instruction"] in questions else r for r in records]
        path.write_text(json.dumps(new))
        prepare.cache_clear()

    lengthen(questions[:2])
    prepared = prepare(options)
    assert (len(prepared.validation), len(prepared.train), prepared.num_long) == (4, 34, 2)
    assert all(len(example.input_ids) <= 64 for example in prepared.validation)
    lengthen(questions)
    with pytest.raises(
        ConfigError, match="all 6 validation records are longer than 64 tokens: pass --context"
    ):
        prepare(options)


def test_generation_stops_where_a_reply_ends(options, tmp_path, monkeypatch):
    """A base model whose template ends replies by another token than its EOS."""
    AutoModelForCausalLM.from_pretrained(options.model).save_pretrained(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<unk>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }} {% if m.role == 'assistant' %}<unk>{% endif %}{% endfor %}"
    )
    tokenizer.save_pretrained(tmp_path / "base")
    ends = []

    def evaluate(model, *args, **kwargs):
        ends.extend(model.generation_config.eos_token_id)
        return {"log_loss": 1.0}

    monkeypatch.setattr(training, "evaluate", evaluate)
    settings = replace(options, model=str(tmp_path / "base"), template="chat", steps=1)
    run_job(settings, CONFIG, {}, Job("arithmetic", "full", 1e-3, settings.base, 0))
    assert ends == [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<unk>")]


def test_dropout_does_not_depend_on_the_runs_before(options, tmp_path, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokenizer.save_pretrained(tmp_path / "gpt2")
    rates = dict.fromkeys(("attn_pdrop", "resid_pdrop", "embd_pdrop"), 0.5)
    sizes = {"vocab_size": len(tokenizer), "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    GPT2LMHeadModel(GPT2Config(**sizes, **rates, **ends)).save_pretrained(tmp_path / "gpt2")
    monkeypatch.setattr(training, "evaluate", lambda *args, **kwargs: {"log_loss": 1.0})
    settings = replace(options, model=str(tmp_path / "gpt2"))
    job = Job("arithmetic", "full", 1e-3, settings.base, 0)
    first, again = (run_job(settings, CONFIG, {}, job)["curve"] for _ in range(2))
    assert first == again


@pytest.mark.parametrize(
    ("message", "is_memory"),
    [
        ("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory", True),
        ("[enforce fail at alloc_cpu.cpp:117] data. DefaultCPUAllocator: not enough memory", True),
        ("mat1 and mat2 shapes cannot be multiplied", False),
    ],
)
def test_a_cpu_without_memory_left_is_an_error_with_a_remedy(options, monkeypatch, message, is_memory):
    def fail(*args):
        raise RuntimeError(message)

    monkeypatch.setattr(training, "_run_job", fail)
    with pytest.raises(GrassError if is_memory else RuntimeError, match=re.escape(message)) as caught:
        run_job(options, CONFIG, {}, Job("arithmetic", "full", 1e-3, options.base, 0))
    assert ("A run of full has no memory left: pass a smaller" in str(caught.value)) == is_memory


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


def test_the_command_runs_all_and_goes_on(options, data_dir, tmp_path, capsys):
    change(data_dir / "AddSub" / "test.json", WRONG)
    command = ["reproduce", "--model", options.model, "--data-dir", options.data_dir, *QUICK.split()]
    command += ["--methods", "uniform", "--output", str(tmp_path / "out"), "--json"]
    assert main(command) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    shared = "2 others are among the training records"
    assert (
        f"AddSub: 4 test records, 3 are used; {shared}; log-loss of 3 outputs, 1 others are wrong"
        in captured.err
    )
    assert f"gsm8k: 4 test records, 3 are used; {shared}; log-loss of 3 outputs\n" in captured.err
    assert "tasks of the paper without files: MultiArith, AQuA, SingleEq, SVAMP" in captured.err
    rows = read_rows(tmp_path / "out" / "arithmetic.jsonl")
    settings = tmp_path / "out" / "arithmetic.settings.json"
    assert {row["settings"] for row in rows} == {digest_of(json.loads(settings.read_text()))}
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
    assert table[0] == (
        "arithmetic on tiny, by greedy decoding, at most 3 records a task (--eval-limit); the last 3 columns are the "
        "paper's averages, of 6 tasks"
    )
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


@pytest.fixture
def goes_on(options, tmp_path, capsys):
    """Function that goes on from a row of `options`, and returns the error, if there is one."""
    output = tmp_path / "out"
    command = ["reproduce", "--data-dir", options.data_dir, *QUICK.split(), "--output", str(output)]
    command += ["--minutes", "0", "--model"]
    assert main([*command, options.model]) == 0
    digest = digest_of(json.loads((output / "arithmetic.settings.json").read_text()))
    row = {"task": "arithmetic", "method": "full", "lr": 1.0, "base": "tiny", "order": 0, "log_loss": 1.0}
    write_rows(output / "arithmetic.jsonl", [row | {"settings": digest}])
    capsys.readouterr()

    def go_on(model, *arguments):
        prepare.cache_clear()
        code, error = main([*command, str(model), *arguments]), capsys.readouterr().err.splitlines()[-1]
        assert code == (2 if "pass another --output" in error else 0)
        return error if code else ""

    return go_on


def test_runs_of_the_same_model_elsewhere_are_continued_and_those_of_another_are_not(
    options, tmp_path, goes_on
):
    moved = tmp_path / "elsewhere" / "tiny"
    shutil.copytree(options.model, moved)
    assert goes_on(moved) == ""
    assert "out has runs with --model tiny: pass" in goes_on(shutil.copytree(moved, tmp_path / "renamed"))
    model = AutoModelForCausalLM.from_pretrained(moved)
    with torch.no_grad():
        model.model.norm.weight += 1
    model.save_pretrained(moved)
    assert "out has runs with other weights: pass" in goes_on(moved)


def test_models_of_the_hub_are_told_from_each_other_by_their_whole_name(options):
    one, other = (replace(options, model=name) for name in ("one/tiny", "other/tiny"))
    assert one.base == other.base
    settings = [settings_of(of, CONFIG, weights_of(of.model), {}) for of in (one, other)]
    assert digest_of(settings[0]) != digest_of(settings[1])


def test_runs_of_other_records_are_not_continued(options, data_dir, goes_on):
    change(data_dir / "AddSub" / "test.json", {"instruction": "Another question"})
    assert "out has runs with other records: pass" in goes_on(options.model)


def test_every_row_must_have_the_settings_of_the_run(options, tmp_path, goes_on):
    """Also if the file of settings was removed, or if a row comes from another study."""
    path = tmp_path / "out" / "arithmetic.jsonl"
    own, settings = read_rows(path), path.with_suffix(".settings.json")
    settings.unlink()
    assert "out has runs with other settings: pass" in goes_on(options.model, "--steps", "8")
    assert goes_on(options.model) == ""
    for other in ({"settings": "0123456789ab"}, {}):
        row = {key: value for key, value in own[0].items() if key != "settings"} | {"order": 1}
        write_rows(path, [*own, row | other])
        assert "out has runs with other settings: pass" in goes_on(options.model)


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


def test_a_run_that_is_in_the_file_twice_counts_once(options):
    searches = [
        {"method": "full", "lr": lr, "order": SEARCH_SEED, "log_loss": loss}
        for lr, loss in ((1e-3, 2.0), (2e-3, 1.0), (4e-3, 2.0))
    ]
    results = [
        {"method": "full", "lr": 2e-3, "order": order, "log_loss": loss, "accuracies": {"AddSub": loss}}
        for order, loss in ((0, 0.0), (0, 0.0), (1, 0.5))
    ]
    rows = [row | {"task": "arithmetic", "base": "tiny"} for row in (*searches, *results)]
    found = make_report(rows, options)["methods"]["full"]
    assert (found["runs"], found["log_loss"], found["accuracy"]) == (2, 0.25, 0.25)
