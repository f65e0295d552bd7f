"""`grass chat`.

Would catch: a model asked otherwise than it was trained; a conversation that forgets its turns, or grows past the
model's positions; a run without a model taken for one; output that a program cannot read.
"""

import io
import json
import shutil

import pytest

from grass.cli import main
from grass.finetune.chat import Chat
from grass.finetune.run_folder import read_rows


def test_the_answer_is_that_of_the_evaluation(tiny_run, capsys):
    folder, _ = tiny_run
    row = next(row for row in read_rows(folder / "answers.jsonl") if row["when"] == "after")
    asked = row["prompt"].removeprefix("<s>").strip()
    assert main(["chat", str(folder), "--prompt", asked, "--max-new-tokens", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"prompt": asked, "answer": row["generated"]}
    assert main(["chat", str(folder / "model"), "--prompt", asked, "--max-new-tokens", "4"]) == 0
    assert capsys.readouterr().out.split() == row["generated"].split()


def test_a_conversation_keeps_its_turns_until_it_is_full(tiny_run, monkeypatch, capsys):
    folder, _ = tiny_run
    seen = []
    answer = Chat.answer
    monkeypatch.setattr(
        Chat,
        "answer",
        lambda self, messages, **how: seen.append(list(messages)) or answer(self, messages, **how),
    )
    question = "Ada has 3 apples . How many apples does Ada have now ?"
    lines = ["Ada has 3", "in all", "/clear", *[question] * 6, "How many " * 60, "Ada", ""]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    assert main(["chat", str(folder), "--max-new-tokens", "4"]) == 0
    assert [m["role"] for m in seen[1]] == ["user", "assistant", "user"]
    assert [m["content"] for m in seen[2]] == [question]  # cleared
    assert min(len(messages) for messages in seen[3:8]) == 1  # began anew
    assert [m["content"] for m in seen[-1]] == ["Ada"]  # what is too long is not answered
    err = capsys.readouterr().err
    assert "begins anew" in err
    assert "too long" in err


def test_answers_are_drawn_by_seed(tiny_run, capsys):
    folder, _ = tiny_run
    shown = set()
    for seed in ("0", "0", "1"):
        arguments = ["chat", str(folder), "--prompt", "Ada", "--temperature", "5", "--seed", seed]
        assert main(arguments) == 0
        shown.add(capsys.readouterr().out)
    assert len(shown) == 2


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["none"], 2, "none: no such folder"),
        (["RUN", "--json"], 2, "--json needs --prompt"),
        (["RUN", "--temperature", "hot"], 2, "'hot' is not a number"),
        (["RUN", "--prompt", "How many " * 60], 2, "--prompt leaves no room for an answer"),
        (["UNFINISHED"], 2, "has no model yet; continue it with: grass finetune --resume"),
    ],
)
def test_wrong_usage(tiny_run, tmp_path, capsys, arguments, code, says):
    folder, _ = tiny_run
    shutil.copytree(folder, tmp_path / "unfinished", ignore=shutil.ignore_patterns("model"))
    places = {"RUN": str(folder), "UNFINISHED": str(tmp_path / "unfinished")}
    assert main(["chat", *(places.get(argument, argument) for argument in arguments)]) == code
    shown = capsys.readouterr().err
    assert says in shown
    assert len(shown.splitlines()) == 1


def test_a_model_trained_on_texts_continues_them(inputs, tmp_path, capsys):
    path = tmp_path / "text.jsonl"
    path.write_text(json.dumps({"text": "3 + 4 = 7"}) + "\n")
    options = [
        *inputs[:2],
        "--data",
        str(path),
        *inputs[6:],
        "--steps",
        "3",
        "--output",
        str(tmp_path / "run"),
    ]
    assert main(["finetune", *options]) == 0
    capsys.readouterr()
    assert main(["chat", str(tmp_path / "run"), "--prompt", "3 + 4", "--max-new-tokens", "4"]) == 0
    assert "continues texts" in capsys.readouterr().err
    chat = Chat(tmp_path / "run", 4, 0.0)
    assert chat._tokens([{"role": "user", "content": "3 + 4"}]) == chat.tokenizer("3 + 4")["input_ids"]


def test_lines_that_are_no_text_are_not_answered(tiny_run, monkeypatch, capsys):
    folder, _ = tiny_run
    monkeypatch.setattr(
        "sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe\nAda\n"), errors="surrogateescape")
    )
    assert main(["chat", str(folder), "--max-new-tokens", "2"]) == 0
    assert "not UTF-8" in capsys.readouterr().err
