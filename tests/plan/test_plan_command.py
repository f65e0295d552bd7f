"""Failures these tests catch: rows or keys other than what scripts read, a traceback or several lines where one is due,
a wrong exit code, rows printed before what cannot be is refused, a picture that is not drawn or is left half made, a
network asked for a preset that is mistyped, models refused for the attention or the loss that they train with.
"""

import json
import sys

import pytest

from grass.cli import main
from grass.plan.prediction import METHODS
from tests.support.plan_model import SIZES

pytest.importorskip("transformers", reason="plans are of transformers models")

KEYS = [
    "method", "peak_gib", "weights_gib", "gradients_gib", "states_device_gib", "states_host_gib", "activations_gib",
    "h2d_gib_per_step", "d2h_gib_per_step", "step_floor_ms", "fits",
]  # fmt: skip
SMALL = ("--batch", "1", "--seq", "16")
SMALL_MODEL = {**SIZES, "num_hidden_layers": 3, "max_position_embeddings": 16}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with fewer layers and positions than that of the other tests: here rows are not the subject."""
    from transformers import LlamaConfig

    path = tmp_path_factory.mktemp("model")
    LlamaConfig(**SMALL_MODEL).save_pretrained(path)
    return path


def grass(*arguments):
    return main([str(argument) for argument in arguments])


def test_json(folder, capsys):
    assert grass("plan", "--model", folder, *SMALL, "--gpu-gib", "0.006", "--json") == 0
    captured = capsys.readouterr()
    rows = json.loads(captured.out)
    assert captured.err == ""
    assert [row["method"] for row in rows] == list(METHODS)
    for row in rows:
        assert list(row) == KEYS
        assert row["fits"] is (row["peak_gib"] <= 0.006)
    assert {row["fits"] for row in rows} == {True, False}


def test_table_and_advice(folder, capsys):
    assert grass("plan", "--model", folder, *SMALL, "--host-gib", "0.001", "--active-layers", "1") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{folder}: batch 1 x 16, bfloat16, checkpointed, chunked loss, 1 active")
    table = {line.split()[0]: line for line in lines[3:-2]}
    assert list(table) == list(METHODS)
    assert len({len(line) for line in lines[3:-2] if line.endswith("yes")}) == 1
    assert table["grass-streamed"].endswith("yes, not the host")
    assert lines[-1].startswith("Use grass: ")


def test_a_second_time_gives_the_same(folder, capsys):
    outputs = []
    for _ in range(2):
        assert grass("plan", "--model", folder, *SMALL, "--no-checkpointing", "--loss", "full", "--json") == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]


def test_plot(folder, capsys, tmp_path):
    pytest.importorskip("matplotlib", reason="the chart needs it")
    path = tmp_path / "memory.png"
    assert grass("plan", "--model", folder, *SMALL, "--plot", path) == 0
    assert path.read_bytes().startswith(b"\x89PNG")


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
        (("--seq", "17"), "16 positions"),
        (("--active-layers", "9"), "only 3 layers"),
        (("--buffer-mb", "0.01"), "buffer_mb"),
        (("--buffer-mb", "0.0001"), "buffer_mb"),
    ],
)
def test_what_does_not_fit_the_model_is_wrong_usage_before_the_first_row(folder, capsys, option, told):
    assert grass("plan", "--model", folder, "--batch", "1", "--seq", "16", *option) == 2
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
        **{**SIZES, "num_hidden_layers": 3}, head_dim=32, sliding_window=8
    )
    config.save_pretrained(tmp_path)
    return tmp_path


def test_a_model_without_sdpa_has_its_full_loss_unless_told_otherwise(capped, capsys):
    assert grass("plan", "--model", capped, *SMALL) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines()[0].startswith(
        f"{capped}: batch 1 x 16, bfloat16, checkpointed, full loss"
    )
    assert captured.out.splitlines()[-1].startswith("Use ")
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
