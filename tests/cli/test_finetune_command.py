"""`grass finetune` from the command line.

Would catch: an option that exists in a dataclass but not on the command line, or with another default; results mixed
with progress on stdout; Ctrl-C that leaves nothing to continue; a `--help` or a
wrong option that waits for torch; a stopped run that is tied to the folder in which it began.
"""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from transformers import AutoModelForCausalLM

from grass import GrassConfig, __version__
from grass.cli import main, make_parser
from grass.cli.dataclass_options import argument_docs, given_options
from grass.finetune.options import FinetuneOptions
from grass.finetune.recording import Recorder

ROOT = Path(__file__).parent.parent.parent


def test_version_help_and_no_command(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"grass {__version__}\n"
    assert main(["finetune", "--help"]) == 0
    assert "--active-layers" in capsys.readouterr().out
    assert main([]) == 2


def test_every_setting_is_an_option_with_the_dataclasss_own_default():
    arguments = make_parser().parse_args(["finetune"])
    for cls in (FinetuneOptions, GrassConfig):
        assert given_options(arguments, cls) == {}
        documented = argument_docs(cls)
        for field in dataclasses.fields(cls):
            assert documented[field.name]
            text = __file__ if field.name in ("data", "eval") else "text"  # files must exist
            value = {bool: [], int: ["7"], float: ["0.5"], int | None: ["7"]}.get(field.type, [text])
            parsed = make_parser().parse_args(["finetune", "--" + field.name.replace("_", "-"), *value])
            expected = {bool: True, int: 7, float: 0.5, int | None: 7}.get(field.type, text)
            assert given_options(parsed, cls) == {field.name: expected}
    listed = make_parser().parse_args(["finetune", "--always-active", "lm_head*, *norm*"])
    assert GrassConfig(**given_options(listed, GrassConfig)).always_active == ("lm_head*", "*norm*")


def test_json_is_one_object_on_stdout_and_the_table_is_short(inputs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["finetune", *inputs, "--steps", "6", "--json"]) == 0
    captured = capsys.readouterr()
    results = json.loads(captured.out)
    assert results["steps"] == 6
    assert results["run"].startswith("runs")
    assert "training 6/6" in captured.err
    AutoModelForCausalLM.from_pretrained(results["model"])
    assert main(["finetune", *inputs, "--steps", "2", "--output", "again"]) == 0
    table = capsys.readouterr().out
    assert len(table.strip().splitlines()) <= 18
    for word in (
        "held-out loss",
        "held-out accuracy",
        "trained per step",
        "optimizer state",
        "tokens per second",
    ):
        assert word in table
    assert main(["finetune", *inputs, "--steps", "2", "--output", "again"]) == 2
    assert "again: holds a finished run" in capsys.readouterr().err


def test_ctrl_c_leaves_a_checkpoint_that_resume_continues(inputs, tmp_path, capsys):
    run = tmp_path / "run"
    command = [sys.executable, "-m", "grass", "finetune", *inputs, "--steps", "100000"]
    process = subprocess.Popen(
        [*command, "--log-steps", "5", "--output", str(run)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        deadline = time.monotonic() + 240
        metrics = run / "metrics.jsonl"
        while not (metrics.exists() and metrics.read_text().count("\n") >= 3):
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130
    assert out == ""
    assert "Traceback" not in err
    assert f"continue with: grass finetune --resume {run}" in err
    (checkpoint,) = (run / "checkpoints").iterdir()
    stopped_at = int(checkpoint.name.split("-")[1])

    # A hundred thousand steps are too many for a test: pretend that fewer had been asked for.
    for path, key in ((run / "run.json", "options"), (checkpoint / "trainer_state.json", None)):
        content = json.loads(path.read_text())
        (content if key is None else content[key])["max_steps" if key is None else "steps"] = stopped_at + 3
        path.write_text(json.dumps(content))
    assert main(["finetune", "--resume", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == stopped_at + 3
    assert main(["finetune", "--resume", str(run)]) == 2
    assert "the run is finished" in capsys.readouterr().err


QUICK_ANSWERS = [
    ["--help"],
    ["finetune", "--help"],
    ["layers", "--help"],
    ["plan", "--help"],
    ["finetune", "--batchsize", "4"],
    ["finetune", "--lr", "-1"],
    ["finetune", "--model", ".", "--data", "none.jsonl"],
    ["finetune", "--output", "pyproject.toml"],
    ["finetune", "--resume", "none"],
    ["layers", "./none"],
    ["plan", "--model", "llama9"],
]


def test_help_and_wrong_usage_do_not_wait_for_torch():
    code = (
        f"import sys; from grass.cli import main; [main(arguments) for arguments in {QUICK_ANSWERS}];"
        "slow = {'torch', 'numpy', 'transformers', 'accelerate', 'matplotlib', 'tokenizers'} & set(sys.modules);"
        "sys.exit(str(slow) if slow else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_a_run_is_resumed_from_another_folder(inputs, tmp_path, monkeypatch, capsys):
    """Its paths were given relative to the folder in which it began."""
    model, train, heldout = (Path(inputs[i]) for i in (1, 3, 5))
    began, other = model.parent, tmp_path / "other"
    other.mkdir()
    monkeypatch.chdir(began)
    original = Recorder.on_step_end

    def on_step_end(self, args, state, control, **context):
        self.stop.requested = state.global_step == 2
        return original(self, args, state, control, **context)

    names = ["--model", model.name, "--data", train.name, "--eval", heldout.name, *inputs[6:]]
    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "on_step_end", on_step_end)
        assert main(["finetune", *names, "--steps", "4", "--output", "elsewhere/run"]) == 130
    monkeypatch.chdir(other)
    assert main(["finetune", "--resume", str(began / "elsewhere" / "run"), "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["steps"] == 4
    assert list(other.iterdir()) == []


def test_an_empty_output_folder_is_used(inputs, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    assert main(["finetune", *inputs, "--steps", "2", "--output", str(tmp_path / "run"), "--json"]) == 0
    assert (tmp_path / "run" / "results.json").is_file()


def test_debug_shows_the_traceback(inputs, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(inputs[1], folder)
    (folder / "model.safetensors").write_bytes(b"")
    command = ["finetune", "--model", str(folder), *inputs[2:], "--output", str(tmp_path / "run")]
    assert main(command) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "cannot load its weights" in line
    assert line.endswith("--debug shows the traceback")
    assert main([*command, "--debug"]) == 1
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert "SafetensorError" in shown
    assert "cannot load its weights" in shown.splitlines()[-1]
