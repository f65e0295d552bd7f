"""Options from a file.

Would catch: numbers that YAML reads as text (1e-5), lists and switches that are lost, a command line that the file
overrides, a misspelt option that is ignored, an earlier run that cannot be run again from its run.json.
"""

import json

import pytest
import yaml

from grass.cli import main, make_parser
from grass.cli.dataclass_options import given_options
from grass.cli.finetune import read_config
from grass.config import GrassConfig
from grass.finetune.options import FinetuneOptions
from grass.finetune.run_folder import RunFolder

SETTINGS = {
    "model": "m",
    "data": ["a.jsonl", "b.jsonl"],
    "columns": ["instruction=q", "output=a"],
    "lr": "1e-5",
    "fused_backward": True,
    "packing": False,
    "max_grad_norm": 0,
    "offload": "streamed",
    "steps": None,
}


def parse(path):
    arguments = make_parser().parse_args(["finetune", *read_config(path)])
    return given_options(arguments, FinetuneOptions) | given_options(arguments, GrassConfig)


@pytest.mark.parametrize("name", ["run.yaml", "run.json"])
def test_values_are_those_of_the_command_line(tmp_path, name):
    path = tmp_path / name
    text = (
        json.dumps(SETTINGS) if name.endswith("json") else yaml.safe_dump(SETTINGS).replace("'1e-5'", "1e-5")
    )
    path.write_text(text)
    given = parse(path)
    assert given == {
        "model": "m",
        "data": ("a.jsonl", "b.jsonl"),
        "columns": ("instruction=q", "output=a"),
        "lr": 1e-5,
        "fused_backward": True,
        "packing": False,
        "max_grad_norm": 0.0,
        "offload": "streamed",
    }


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("learning_rate: 1", "c.yaml: there is no option 'learning_rate'"),
        ("sample_intervall: 3", "did you mean sample_interval?"),
        ("resume: runs/x", "there is no option 'resume'"),
        ("lr: fast", "c.yaml: argument --lr: invalid float value: 'fast'"),
        ("- lr", "expected names of options with values"),
        ("lr: [", "not valid YAML or JSON"),
        ("lr: -1", "lr must be a positive number"),
    ],
)
def test_wrong_files_are_one_line(tmp_path, capsys, text, says):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    assert main(["finetune", "--config", str(path)]) == 2
    shown = capsys.readouterr().err
    assert says in shown
    assert len(shown.splitlines()) == 1


def test_a_run_is_run_again_and_the_command_line_has_the_last_word(tmp_path, monkeypatch, tiny_run):
    monkeypatch.chdir(tmp_path)
    first, record = tiny_run
    assert main(["finetune", "--config", str(first / "run.json"), "--output", "again"]) == 0
    again = RunFolder.open(tmp_path / "again")
    assert {**again.record["options"], "output": ""} == {**record["options"], "output": ""}
    assert again.record["config"] == record["config"]
    assert (tmp_path / "again" / "model" / "model.safetensors").read_bytes() == (
        first / "model" / "model.safetensors"
    ).read_bytes()
    assert main(["finetune", "--config", str(first / "run.json"), "--output", "other", "--lr", "3e-3"]) == 0
    other = RunFolder.open(tmp_path / "other").record
    assert other["options"]["lr"] == 3e-3
    assert other["options"]["steps"] == record["options"]["steps"]


@pytest.mark.parametrize(
    ("in_file", "option", "kept"),
    [
        ({"epochs": 2.0}, ["--steps", "4"], {"steps": 4}),
        ({"steps": 4}, ["--epochs", "0.5"], {"epochs": 0.5}),
        ({"eval": "b.jsonl"}, ["--eval-fraction", "0.2"], {"eval_fraction": 0.2}),
    ],
)
def test_the_command_line_replaces_what_it_excludes(tmp_path, monkeypatch, in_file, option, kept):
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).touch()
    seen = []
    monkeypatch.setattr(
        "grass.cli.finetune._run_job", lambda resume, given, *rest: seen.append(given) or exit(0)
    )
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"model": "m", "data": "a.jsonl", **in_file}))
    assert main(["finetune", "--config", "c.yaml", *option]) == 0
    assert seen == [{"model": "m", "data": "a.jsonl", **kept}]
