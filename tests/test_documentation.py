"""Failures these tests catch: an example in README.md or docs/ that does not run, a command there with an option that
does not exist, a link to a file or a heading that is not there.
"""

import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest
import torch

import grass
from grass.cli import make_parser

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


def blocks(page: Path, language: str) -> list[str]:
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```$", page.read_text(), re.DOTALL | re.MULTILINE)
    return [re.sub(f"^{indent}", "", block, flags=re.MULTILINE) for indent, block in found]


@pytest.fixture
def names(tmp_path):
    """Names that the examples use without defining them."""
    transformers = pytest.importorskip("transformers", reason="the examples train its models")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(**sizes, vocab_size=32, num_hidden_layers=3, max_position_embeddings=8)
    ids = torch.arange(8).view(1, 8)
    batch = {"input_ids": ids, "labels": ids}
    args = transformers.TrainingArguments(str(tmp_path), max_steps=25, report_to="none", use_cpu=True)
    model = transformers.LlamaForCausalLM(config)
    return {
        "model": model,
        "batches": [batch] * 25,
        "Trainer": transformers.Trainer,
        "args": args,
        "data": [{"input_ids": ids[0], "labels": ids[0]}] * 8,
        "optimizer": grass.GrassAdamW(model, config=grass.GrassConfig(probe_steps=0, fused_backward=True)),
        "first_half": batch,
        "second_half": batch,
    }


@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.stem
)
def test_examples_run(page, names):
    for block in blocks(page, "python"):
        exec(compile(block, page.name, "exec"), names)
    if "trainer" in names:
        with contextlib.redirect_stdout(io.StringIO()):
            names["trainer"].train()
        assert isinstance(names["trainer"].optimizer.optimizer, grass.GrassAdamW)
    if "config" in names:
        optimizer = grass.GrassAdamW(names["model"], config=names["config"])
        names["model"](**names["batches"][0]).loss.backward()
        optimizer.step()
        assert optimizer.step_count == 1


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "sh")], ids=lambda page: page.stem)
def test_commands_have_the_options_that_are_shown(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for line in "".join(blocks(page, "sh")).splitlines():
        command = shlex.split(line, comments=True)
        if command[:1] == ["grass"]:
            for file in (word for word in command if word.endswith((".json", ".jsonl"))):
                Path(file).touch()
            for folder in (word for word in command if word in ("MODEL", "RUN_DIR")):
                Path(folder).mkdir(exist_ok=True)
                Path(folder, "config.json").touch()
            make_parser().parse_args(command[1:])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_to_files(page):
    links = re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


def anchors(page: Path) -> set[str]:
    """Anchors of the headings of a page, as GitHub writes them: lower case, no punctuation, hyphens for spaces."""
    text = re.sub(r"^( *)```.*?^ *```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    found: dict[str, int] = {}
    for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE):
        heading = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
        anchor = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        found[anchor] = found.get(anchor, -1) + 1
    return {f"{anchor}-{n}" if n else anchor for anchor, last in found.items() for n in range(last + 1)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_to_headings(page):
    links = re.findall(r"\]\((?!https?://)([^)#]*)#([^)]+)\)", page.read_text())
    missing = [
        f"{file}#{anchor}"
        for file, anchor in links
        if anchor not in anchors(page.parent / file if file else page)
    ]
    assert missing == []
