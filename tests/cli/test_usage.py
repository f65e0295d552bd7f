"""Usage that every command of `grass` and of `python -m bench` has in common.

Would catch: a wrong exit code (0 ok, 1 failed, 2 wrong usage); a traceback, or several lines, where one line is due;
wrong usage that is found after something was written or printed; an option that means one thing here and another
there; a traceback where nothing reads stdout; a command of the installed program that needs the source tree.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.__main__ import main as bench
from bench.__main__ import make_parser as make_bench_parser
from grass.cli import main as grass
from grass.cli import make_parser

ROOT = Path(__file__).parent.parent.parent

WRONG_USAGE = [
    (grass, "", "COMMAND"),
    (grass, "bench kernels", "invalid choice: 'bench'"),
    (grass, "finetun --model m", "invalid choice: 'finetun' (did you mean finetune?"),
    (grass, "--jsn plan --model llama2-7b", "grass: unrecognized arguments: --jsn"),
    (grass, "finetune --no-such-option", "--no-such-option; see grass finetune --help"),
    (grass, "finetune --batchsize 4", "--batchsize (did you mean --batch-size?); see grass finetune --help"),
    (grass, "finetune --batchsize=4", "--batchsize (did you mean --batch-size?); see grass finetune --help"),
    (grass, "finetune --method ful", "method must be one of grass, full, not 'ful' (did you mean full?)"),
    (grass, "finetune --sampler adaptve", "(did you mean adaptive?)"),
    (grass, "finetune extra", "unrecognized arguments: extra; see grass finetune --help"),
    (grass, "finetune --samp uniform", "--samp"),
    (grass, "finetune --steps many", "--steps"),
    (grass, "finetune --model m", "--model needs --data"),
    (grass, "finetune --data data.jsonl", "--data needs --model"),
    (grass, "finetune --eval data.jsonl", "--eval needs --model and --data"),
    (grass, "finetune --eval-fraction 0.1", "--eval-fraction needs --model and --data"),
    (grass, "finetune --model m --data data.jsonl --eval data.jsonl --eval-fraction 0.1", "exclude each other"),
    (grass, "finetune --steps 3 --epochs 1", "exclude each other"),
    (grass, "finetune --resume r --lr 1e-3", "leave out --lr"),
    (grass, "finetune --resume r --seed 1", "leave out --seed"),
    (grass, "finetune --resume none", "none: no such folder"),
    (grass, "finetune --resume folder", "not a run of grass finetune"),
    (grass, "finetune --output data.jsonl", "exists and is not a run of grass finetune; pass another --output"),
    (grass, "finetune --ema 3", "ema must be in (0, 1]"),
    (grass, "finetune --sampler best", "sampler must be one of"),
    (grass, "finetune --update-interval 30", "must be a multiple of sample_interval"),
    (grass, "finetune --lr -1", "lr must be a positive number"),
    (grass, "finetune --lr nan", "lr must be a positive number"),
    (grass, "finetune --method lora", "method must be one of grass, full"),
    (grass, "finetune --batch-size 0", "batch_size must be at least 1"),
    (grass, "finetune --active-layers 7", "only 6 layers"),
    (grass, "finetune --pattern model.none.*", "matches no module"),
    (grass, "finetune --always-active ,", "nothing is named"),
    (grass, "finetune --model ./none --data data.jsonl", "there is no model './none'"),
    (grass, "finetune --model folder --data data.jsonl", "folder has no config.json"),
    (grass, "finetune --model llama2-7b --data data.jsonl", "no weights: pass a model's folder or a hub name"),
    (grass, "finetune --model m --data none.jsonl", "none.jsonl: no such file"),
    (grass, "finetune --model m --data openai", "openai: no such file"),
    (grass, "finetune --config none.yaml", "--config none.yaml: cannot be read"),
    (grass, "finetune --config data.jsonl --resume run", "leave out --config"),
    (grass, "finetune --model m --data data.jsonl --load-best", "--load-best needs held-out records"),
    (grass, "finetune --model m --data data.jsonl --columns a", "entries new=old"),
    (grass, "finetune --model m --data data.jsonl --eval none.jsonl", "none.jsonl: no such file"),
    (grass, "layers", "MODEL"),
    (grass, "layers ./none", "there is no model './none'"),
    (grass, "layers folder", "folder has no config.json"),
    (grass, "layers m --pattern ,", "nothing is named"),
    (grass, "plan", "--model"),
    (grass, "plan --model llama9", "pass one of gemma-2b"),
    (grass, "plan --model /none", "there is no model '/none'"),
    (grass, "plan --model llama2-7b --seq 0", "at least 1"),
    (grass, "plan --model llama2-7b --batch x", "not a whole number"),
    (grass, "plan --model llama2-7b --gpu-gib -1", "more than 0"),
    (grass, "plan --model llama2-7b --tflops nan", "more than 0"),
    (grass, "plan --model llama2-7b --loss none", "invalid choice"),
    (grass, "plan --model llama2-7b --dtype int8", "invalid choice"),
    (grass, "plan --model llama2-7b --dtype bfloat", "(did you mean bfloat16?"),
    (grass, "plan --model llama2-7b --layers 2", "--layers (did you mean --active-layers?); see grass plan --help"),
    (grass, "plan --modle llama2-7b", "--modle (did you mean --model?); see grass plan --help"),
    (grass, "plan --model llama2-7b --active-layers 33", "only 32 layers"),
    (grass, "plan --model llama2-7b --plot none/file.png", "--plot none/file.png cannot be written"),
    (bench, "", "COMMAND"),
    (bench, "kernels --sizes many", "'many' is not a number"),
    (bench, "kernels --sizes 1e5,-3", "whole number"),
    (bench, "kernels --sizes 1.5", "whole number"),
    (bench, "kernels --sizes inf", "whole number"),
    (bench, "kernels --sizes ,", "no size"),
    (bench, "kernels --seconds 0", "more than 0"),
    (bench, "kernels --seconds soon", "not a number"),
    (bench, "kernels --size 1e5", "unrecognized arguments"),
    (bench, "kernels --out none/rows", "--out none/rows cannot be written"),
    (bench, "kernels --out folder", "--out folder cannot be written"),
    (bench, "kernels --out new --plot none/chart.png", "--plot none/chart.png cannot be written"),
    (bench, "offload --model gpt", "pass one of"),
    (bench, "offload --active-layers 33", "has 32 layers"),
    (bench, "offload --layer-indices 1,32", "has 32 layers"),
    (bench, "offload --buffer-mb 0.01", "buffer_mb"),
    (bench, "offload --layer-indices 0,1 --active-layers 2", "not allowed with"),
    (bench, "offload --layer-indices 1,1", "twice"),
    (bench, "offload --layer-indices one", "not a layer's number"),
    (bench, "offload --layer-indices ,", "not a layer's number"),
    (bench, "offload --active-layers 0", "at least 1"),
    (bench, "offload --duplex-factor 1.5", "at most 1"),
    (bench, "offload --pcie-gbs 0", "more than 0"),
    (bench, "offload --plot none/step.png", "--plot none/step.png cannot be written"),
    (bench, "host --seconds 0", "more than 0"),
    (bench, "host --tensors 1", "at least 2"),
    (bench, "host --tensors x", "not a whole number"),
    (bench, "host --out none/rows", "--out none/rows cannot be written"),
    (bench, "gpu --minutes 0", "more than 0"),
    (bench, "gpu --minutes 1e9", "less than a day"),
    (bench, "gpu --output data.jsonl", "is a file"),
    (bench, "figures --largest 0", "at least 1"),
    (bench, "figures --out none/rows", "--out none/rows cannot be written"),
    (bench, "training --seq 0", "at least 1"),
    (bench, "training --methods best", "invalid choice"),
    (bench, "training --model llama9", "there is no model 'llama9'"),
    (bench, "report --results none", "--results none: no such folder"),
    (bench, "report --page none/page.md", "--page none/page.md cannot be written"),
]  # fmt: skip


def ids(value):
    return value if isinstance(value, str) else {grass: "grass", bench: "bench"}.get(value)


@pytest.fixture
def _place(tmp_path, monkeypatch):
    """A folder that is no model and no run, and a file that is no data."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    Path("folder").mkdir()
    Path("data.jsonl").write_text('{"text"\n')


def assert_one_line(capsys, program, says):
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"{'grass' if program is grass else 'python -m bench'}")
    assert captured.err.count("\n") == 1
    assert says in captured.err
    assert sorted(path.name for path in Path().rglob("*")) == ["data.jsonl", "folder"]


@pytest.mark.usefixtures("_place")
@pytest.mark.parametrize(("program", "arguments", "says"), WRONG_USAGE, ids=ids)
def test_wrong_usage_is_2_in_one_line_and_changes_nothing(program, arguments, says, capsys):
    assert program(arguments.split()) == 2
    assert_one_line(capsys, program, says)


@pytest.mark.usefixtures("_place")
@pytest.mark.parametrize(
    ("program", "arguments", "says"),
    [
        (grass, "finetune --model m --data data.jsonl", "data.jsonl:1: not valid JSON"),
        (bench, "gpu", "no CUDA or ROCm device"),
        (bench, "training", "no CUDA or ROCm device"),
        (bench, "report --results folder --page data.jsonl --check", "run python -m bench report"),
    ],
    ids=ids,
)
def test_a_failed_run_is_1_in_one_line(program, arguments, says, capsys):
    assert program(arguments.split()) == 1
    assert_one_line(capsys, program, says)


def commands(parser) -> dict[str, argparse.ArgumentParser]:
    return next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction)).choices


def test_the_installed_program_has_no_benchmarks():
    assert set(commands(make_parser())) == {"chat", "finetune", "layers", "plan", "reproduce"}


@pytest.mark.parametrize("program", [grass, bench], ids=ids)
def test_every_command_has_help_and_json_where_it_prints_rows(program, capsys):
    found = commands(make_parser() if program is grass else make_bench_parser())
    for name, parser in found.items():
        assert program([name, "--help"]) == 0
        assert "--help" in capsys.readouterr().out
        assert name == "report" or "--json" in parser._option_string_actions


def test_an_option_means_one_thing():
    """The meaning of an option: number and kind of its values, and its name in the help."""
    meanings: dict[str, dict] = {}
    for make in (make_parser, make_bench_parser):
        for command, parser in commands(make()).items():
            for action in parser._actions:
                kind = action.nargs == 0, None if action.choices else action.metavar or action.dest.upper()
                for option in action.option_strings:
                    meanings.setdefault(option, {}).setdefault(kind, []).append(command)
    clashes = {option: found for option, found in meanings.items() if len(found) > 1}
    # choices stand for the metavar where a dataclass has none to give
    assert set(clashes) <= {
        *("--loss", "--dtype", "--rounding", "--state-dtype", "--methods", "--help", "-h")
    }, clashes
    assert not {"--layers", "--active"} & set(meanings)
    for option, words in {
        "--active-layers": ("layers",),
        "--pattern": ("paths",),
        "--out": ("line",),
    }.items():
        helps = [
            parser._option_string_actions[option].help
            for make in (make_parser, make_bench_parser)
            for parser in commands(make()).values()
            if option in parser._option_string_actions
        ]
        assert all(word in text for text in helps for word in words), helps


@pytest.mark.parametrize(
    "command", ["grass --help", "grass layers .", "bench --help", "bench kernels --list", "bench gpu --list"]
)
def test_a_reader_that_goes_away_leaves_no_traceback(command, tmp_path):
    config = {"model_type": "gpt2", "n_layer": 2, "n_head": 2, "n_embd": 8, "vocab_size": 9}
    tokens = {"bos_token_id": 1, "eos_token_id": 1}
    (tmp_path / "config.json").write_text(json.dumps({**config, **tokens}))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("PYTHONUNBUFFERED", None)
    with subprocess.Popen(
        [sys.executable, "-m", *command.split()],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        process.stdout.close()
        assert (process.stderr.read(), process.wait()) == ("", 141)
