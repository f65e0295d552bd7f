"""Failures these tests catch: defaults or names other than those of `grass finetune`, a command line that it does not
accept or that trains otherwise than was planned, a chart without a sign of progress, rows or keys other than what
scripts read, a traceback or several lines where one is due, a wrong exit code, rows printed before what cannot be is
refused, a picture that is not drawn or is left half made, a network asked for a preset that is mistyped, models
refused for the attention or the loss that they train with.
"""

import dataclasses
import gc
import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from grass.cli import main, make_parser
from grass.cli.dataclass_options import given_options
from grass.config import GrassConfig
from grass.finetune.options import FinetuneOptions
from grass.plan.prediction import METHODS
from tests.support.plan_model import SIZES

pytest.importorskip("transformers", reason="plans are of transformers models")

KEYS = [
    "method", "peak_gib", "weights_gib", "gradients_gib", "states_device_gib", "states_host_gib", "activations_gib",
    "h2d_gib_per_step", "d2h_gib_per_step", "step_floor_ms", "fits", "gathered_gib_per_step", "reduced_gib_per_step",
    "compute_ms", "collectives_ms",
]  # fmt: skip
SMALL = ("--batch-size", "1", "--context", "16", "--activation-checkpointing")
SMALL_MODEL = {**SIZES, "num_hidden_layers": 3, "max_position_embeddings": 16}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with fewer layers and positions than that of the other tests: here rows are not the subject."""
    from transformers import LlamaConfig

    path = tmp_path_factory.mktemp("model")
    LlamaConfig(**SMALL_MODEL, dtype="bfloat16").save_pretrained(path)
    return path


def grass(*arguments):
    return main([str(argument) for argument in arguments])


def plan(*arguments):
    return make_parser().parse_args(["plan", "--model", "llama2-7b", *arguments])


def test_defaults_are_those_of_finetune():
    arguments = vars(plan())
    shared = set()
    for cls in (FinetuneOptions, GrassConfig):
        for field in dataclasses.fields(cls):
            if field.name in arguments and field.name != "model":
                assert arguments[field.name] == field.default
                shared.add(field.name)
    assert shared >= {
        "batch_size", "context", "activation_checkpointing", "dtype", "rounding", "loss",
        "active_layers", "sample_interval", "buffer_mb", "buffer_count",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("--batch 4 --seq 16", "--batch-size 4 --context 16"),
        ("--checkpointing", "--activation-checkpointing"),
        ("--no-checkpointing", "--no-activation-checkpointing"),
        ("--master-weights", "--rounding master"),
        ("--no-master-weights", "--rounding nearest"),
    ],
)
def test_older_names_are_accepted_and_not_shown_as_options(old, new, capsys):
    assert vars(plan(*old.split())) == vars(plan(*new.split()))
    assert grass("plan", "--help") == 0
    shown = capsys.readouterr().out
    for option in (word for word in old.split() if word.startswith("--")):
        assert not re.search(rf"(\n  |\[){option}[ ,]", shown)


def test_the_step_is_that_of_finetune(tmp_path, capsys):
    """Length, dtype and loss where they are not given."""
    from transformers import LlamaConfig

    sizes = {**SMALL_MODEL, "hidden_size": 64, "intermediate_size": 64}
    for positions, length, vocabulary, loss, dtype in (
        (16, 16, 512, "full", "float32"), (2048, 1024, 16_384, "chunked", "bfloat16"),
    ):  # fmt: skip
        given = {**sizes, "max_position_embeddings": positions, "vocab_size": vocabulary, "dtype": dtype}
        LlamaConfig(**given).save_pretrained(tmp_path)
        assert grass("plan", "--model", tmp_path) == 0
        captured = capsys.readouterr()
        assert captured.err == ""
        assert captured.out.startswith(
            f"{tmp_path}: batch {FinetuneOptions.batch_size} x {length}, {dtype}, all activations, {loss} loss"
        )


def test_a_dtype_that_is_not_told_is_said(tmp_path, capsys):
    from transformers import LlamaConfig

    LlamaConfig(**SMALL_MODEL).save_pretrained(tmp_path)
    assert grass("plan", "--model", tmp_path, *SMALL) == 0
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert "--dtype" in captured.err
    assert "--dtype bfloat16" in captured.out.splitlines()[-1]


def test_float16_has_no_master_weights_and_is_planned_without(folder, tmp_path, capsys):
    """As `grass finetune` trains a model that was saved in it; another one it converts to bfloat16 only."""
    from transformers import LlamaConfig

    LlamaConfig(**SMALL_MODEL, dtype="float16").save_pretrained(tmp_path)
    assert grass("plan", "--model", tmp_path, *SMALL) == 2
    assert_one_line(capsys, "float16", "--dtype bfloat16", "--rounding nearest")
    assert grass("plan", "--model", tmp_path, *SMALL, "--rounding", "nearest") == 0
    assert "dtype" not in capsys.readouterr().out.splitlines()[-1]
    assert grass("plan", "--model", folder, *SMALL, "--rounding", "nearest", "--dtype", "float16") == 0
    assert "only if the model was saved in it" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize(
    ("given", "options", "config"),
    [
        ("", {}, {}),
        (
            "--batch-size 1 --context 16 --activation-checkpointing --rounding nearest --loss full --dtype float32 "
            "--active-layers 1 --sample-interval 30",
            {
                "batch_size": 1, "context": 16, "activation_checkpointing": True, "rounding": "nearest",
                "loss": "full", "dtype": "float32",
            },
            {"active_layers": 1, "sample_interval": 30, "update_interval": 120},
        ),
    ],
)  # fmt: skip
def test_the_last_line_is_a_command_that_trains_as_planned(
    folder, capsys, tmp_path, monkeypatch, given, options, config
):
    monkeypatch.chdir(tmp_path)
    Path("FILE").touch()
    assert grass("plan", "--model", folder, *given.split()) == 0
    out = capsys.readouterr().out.splitlines()
    chosen = next(line for line in out if line.startswith("Use ")).split()[1].rstrip(":")
    words = shlex.split(out[-1])
    assert words[:2] == ["grass", "finetune"]
    parsed = make_parser().parse_args(words[1:])
    if chosen == "grass-adamw":
        options, config = {**options, "method": "full"}, {}
    else:
        config = {**config, "offload": chosen.removeprefix("grass-") if "-" in chosen else "none"}
    assert given_options(parsed, FinetuneOptions) == {"model": str(folder), "data": "FILE", **options}
    assert given_options(parsed, GrassConfig) == config


def test_a_preset_is_no_model_of_finetune_and_the_command_says_so(capsys, monkeypatch):
    """Rows are not the subject: those of a small model stand for them."""
    from grass.plan import models

    configuration = models.configuration

    def small(name):
        config = configuration(name)
        config.update({**SMALL_MODEL, "head_dim": 32})
        return config

    monkeypatch.setattr(models, "configuration", small)
    assert grass("plan", "--model", "llama2-7b", "--context", "16") == 0
    command, remark = capsys.readouterr().out.splitlines()[-2:]
    assert command.startswith("grass finetune --model MODEL --data FILE --context 16 --dtype bfloat16")
    assert remark.startswith("MODEL is a folder or hub name with the weights of llama2-7b")


def test_json(folder, capsys, caplog):
    assert grass("plan", "--model", folder, *SMALL, "--gpu-gib", "0.006", "--json") == 0
    captured = capsys.readouterr()
    rows = json.loads(captured.out)
    assert captured.err == ""
    assert [row["method"] for row in rows] == list(METHODS)
    for row in rows:
        assert list(row) == KEYS
        assert row["fits"] is (row["peak_gib"] <= 0.006)
    assert {row["fits"] for row in rows} == {True, False}
    gc.collect()  # optimizers tell at their end what they have not done
    assert caplog.records == []


def test_table_and_advice(folder, capsys):
    assert grass("plan", "--model", folder, *SMALL, "--host-gib", "0.001", "--active-layers", "1") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{folder}: batch 1 x 16, bfloat16, checkpointed, full loss, 1 active")
    table = {line.split()[0]: line for line in lines[3:-4]}
    assert list(table) == list(METHODS)
    assert len({len(line) for line in lines[3:-4] if line.endswith("yes")}) == 1
    assert table["grass-streamed"].endswith("yes, not the host")
    assert lines[-3].startswith("Use grass: ")


def test_a_second_time_gives_the_same(folder, capsys):
    outputs = []
    for _ in range(2):
        assert (
            grass(
                "plan", "--model", folder, *SMALL, "--no-activation-checkpointing", "--loss", "full", "--json"
            )
            == 0
        )
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]


def test_plot(folder, capsys, tmp_path):
    pytest.importorskip("matplotlib", reason="the chart needs it")
    path = tmp_path / "memory.png"
    assert grass("plan", "--model", folder, *SMALL, "--plot", path) == 0
    assert path.read_bytes().startswith(b"\x89PNG")
    told = capsys.readouterr().err.splitlines()
    assert 1 < len(told) <= 10
    assert all(line.startswith("chart ") for line in told)
    assert told[-1].split()[1] == "16/16"  # two more lengths of the rows that are no probe


def test_points_of_the_chart_bound_what_it_costs(folder, capsys, tmp_path):
    pytest.importorskip("matplotlib", reason="the chart needs it")
    path = tmp_path / "memory.png"
    assert grass("plan", "--model", folder, *SMALL, "--plot", path, "--plot-points", "1", "--json") == 0
    assert path.exists()
    captured = capsys.readouterr()
    assert captured.err == ""
    assert len(json.loads(captured.out)) == len(METHODS)
    assert grass("plan", "--model", folder, "--plot", path, "--plot-points", "99") == 2
    assert_one_line(capsys, "at most 7")


def test_plot_that_cannot_be_written_is_known_at_once(folder, capsys, tmp_path):
    assert grass("plan", "--model", folder, "--plot", tmp_path / "no" / "file.png") == 2
    assert_one_line(capsys, "cannot be written")


@pytest.mark.parametrize("name", ["llama9", "./no/such/model", "/no/such/model", "a/b/c"])
def test_name_that_leads_nowhere_is_one_line_with_what_is_possible(capsys, monkeypatch, name):
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", lambda name: pytest.fail("asked the hub"))
    assert grass("plan", "--model", name) == 2
    assert_one_line(capsys, name, "llama2-7b", "folder", "hub")


@pytest.mark.parametrize(
    "content", [None, "{", "{}", '{"model_type": "no-such-type"}', '{"model_type": "vit"}']
)
def test_folder_without_a_usable_configuration(tmp_path, capsys, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    assert grass("plan", "--model", tmp_path) == (2 if content is None else 1)
    assert_one_line(capsys, str(tmp_path))


def test_a_configuration_that_its_own_class_refuses(tmp_path, capsys):
    LlamaConfig = pytest.importorskip("transformers").LlamaConfig
    values = {**LlamaConfig(**SIZES).to_dict(), "hidden_size": 63}
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert grass("plan", "--model", tmp_path) == 1
    assert_one_line(capsys, str(tmp_path), "63")


@pytest.mark.parametrize(
    ("option", "told"),
    [
        (("--context", "17"), "16 positions"),
        (("--active-layers", "9"), "only 3 layers"),
        (("--buffer-mb", "0.01"), "buffer_mb"),
        (("--buffer-mb", "0.0001"), "buffer_mb"),
    ],
)
def test_what_does_not_fit_the_model_is_wrong_usage_before_the_first_row(folder, capsys, option, told):
    assert grass("plan", "--model", folder, *SMALL, *option) == 2
    assert_one_line(capsys, told)


def test_a_buffer_that_holds_a_chunk_of_small_moments_only(folder, capsys):
    """The size that the error names is enough, and is not for moments twice as wide."""
    options = ("--buffer-mb", "0.01", "--state-dtype", "bfloat16")
    assert grass("plan", "--model", folder, *SMALL, *options) == 2
    least = float(capsys.readouterr().err.split()[-1])
    options = ("--buffer-mb", str(least), "--state-dtype")
    assert grass("plan", "--model", folder, *SMALL, *options, "bfloat16") == 0
    capsys.readouterr()
    assert grass("plan", "--model", folder, *SMALL, *options, "float32") == 2
    assert_one_line(capsys, "buffer_mb")


@pytest.fixture
def capped(tmp_path):
    """A model that transformers trains with eager attention, and whose logits no linear layer gives."""
    config = pytest.importorskip("transformers").Gemma2Config(
        **{**SIZES, "num_hidden_layers": 3}, head_dim=32, sliding_window=8, dtype="bfloat16"
    )
    config.save_pretrained(tmp_path)
    return tmp_path


def test_a_model_without_sdpa_has_its_full_loss_unless_told_otherwise(capped, capsys):
    assert grass("plan", "--model", capped, *SMALL) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines()[0].startswith(
        f"{capped}: batch 1 x 16, bfloat16, checkpointed, full loss"
    )
    assert "\nUse " in captured.out
    assert captured.err.count("\n") == 1
    assert "full loss" in captured.err


def test_a_chunked_loss_that_cannot_be_is_wrong_usage(capped, capsys):
    assert grass("plan", "--model", capped, *SMALL, "--loss", "chunked") == 2
    assert_one_line(capsys, "--loss full")


def test_without_transformers_the_extra_is_named(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert grass("plan", "--model", "llama2-7b") == 1
    assert "pip install grass-optim[transformers]" in capsys.readouterr().err


def test_without_peft_the_other_rows_are_there(folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    assert grass("plan", "--model", folder, *SMALL, "--json") == 0
    captured = capsys.readouterr()
    assert [row["method"] for row in json.loads(captured.out)] == [
        name for name in METHODS if "lora" not in name
    ]
    assert "peft is not installed" in captured.err


def assert_one_line(capsys, *parts):
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("grass plan: ")
    assert captured.err.count("\n") == 1
    for part in parts:
        assert part in captured.err
