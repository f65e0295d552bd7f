"""Study B: its options, and the norms of a real model's layers, here of a tiny one.

Would catch: a method or task that does not exist; norms of other layers, or not root mean squares; gradients or flags
that are left behind.
"""

import json
from dataclasses import replace

import pytest
import torch

from bench.quality import norms, real
from bench.quality.comparison import Found
from bench.quality.evidence import in_short, page
from bench.quality.real import CONFIG, METHODS, STAGES, TASKS, options_for
from bench.quality.tables import tables_page
from grass.errors import GrassError
from grass.finetune.arithmetic import word_problems
from grass.finetune.demo import demo_tokenizer
from grass.finetune.encoding import Example
from grass.finetune.model import load_model
from grass.finetune.run_folder import read_rows, write_rows
from grass.reproduce import methods
from grass.reproduce.tables import TABLES
from tests.support.saved_model import save_tiny_model
from tests.support.study import found_in, write_real


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny", demo_tokenizer())


@pytest.mark.parametrize("table", TASKS)
def test_the_study_names_methods_and_tasks_that_exist(table):
    options = options_for(table, "model", "data", "out", 2, 60.0)
    assert set(METHODS[table]) <= set(methods.METHODS)
    assert {"full", "uniform", "static", "grass", "shuffled"} <= set(options.methods)
    assert set(TASKS[table]) <= set(TABLES[table].tasks)
    assert options.seeds >= 3
    assert len(options.search.rates) >= 3
    assert CONFIG.for_run(options.search_steps).probe_steps == CONFIG.probe_steps
    assert len(set(STAGES)) == 4
    assert max(STAGES) < options.steps  # else the learning rate would be negative


def test_norms_are_root_mean_squares_of_the_layers_gradients(tiny_model):
    model, _ = load_model(str(tiny_model))
    frozen = model.model.layers[1].mlp.up_proj.weight.requires_grad_(False)
    ids = list(range(5, 15))
    found = norms.layer_norms(model, [Example(ids, ids)])
    assert not frozen.requires_grad
    assert all(p.grad is None for p in model.parameters())
    frozen.requires_grad_(True)
    tokens = torch.tensor([ids])
    model(input_ids=tokens, labels=tokens).loss.backward()
    for layer, norm in zip(model.model.layers, found, strict=True):
        grads = torch.cat([p.grad.flatten() for p in layer.parameters()])
        assert float(norm) == pytest.approx(float(grads.square().mean().sqrt()), rel=1e-5)


def test_rows_are_of_tasks_and_of_stages(tiny_model, tmp_path, monkeypatch):
    train, heldout = word_problems(40, 8, seed=0)
    for task in ("AddSub", "gsm8k"):
        (tmp_path / task).mkdir()
        (tmp_path / task / "test.json").write_text(json.dumps([p.record for p in heldout]))
    (tmp_path / "math_data.json").write_text(json.dumps([p.record for p in train]))
    monkeypatch.setattr(norms, "STAGES", (0, 3))
    monkeypatch.setattr(norms, "CONFIG", replace(CONFIG, active_layers=1))

    def options(*arguments):
        return replace(options_for(*arguments), tasks=("AddSub",), validation=8, context=64, steps=4)

    monkeypatch.setattr(norms, "options_for", options)
    rows = list(norms.measure(str(tiny_model), str(tmp_path), 1e-3))
    assert [(row["panel"], row["name"]) for row in rows] == [
        ("arithmetic", "gsm8k"),
        ("arithmetic", "AddSub"),
        ("arithmetic, while training", "step 0"),
        ("arithmetic, while training", "step 3"),
    ]
    assert all(len(row["norms"]) == 4 and min(row["norms"]) > 0 for row in rows)
    assert rows[2]["norms"] != rows[3]["norms"]


def test_rows_of_the_real_model_are_compared_by_order(tmp_path, rows):
    """Another order's loss; an arm with fewer orders; a method that has none."""
    losses = {"grass": [0.5, 0.6, 0.7], "uniform": [0.6, 0.6, 0.6], "full": [0.4, 0.5], "static": []}
    write_real(tmp_path, "arithmetic", losses)
    report = real.report_of(tmp_path, "arithmetic")
    assert report.differences["uniform"] == [
        pytest.approx(of) for of in ((-0.1, 10.0), (0.0, 0.0), (0.1, -10.0))
    ]
    assert report.differences["full"] == [pytest.approx((0.1, -10.0))] * 2
    assert not report.differences["static"]
    assert report.methods["grass"]["lr"] == 2e-4
    found = Found.of(tmp_path)
    assert "SmolLM2" not in in_short(found_in(rows, tmp_path))  # not run completely
    table = tables_page(found)
    assert "**arithmetic**, 677 training records, 1.7 hours of two cores" in table
    missing = "the part `confirmation`, arithmetic on the real model, commonsense on the real model, norms of"
    assert missing in page(found)
    assert "| grass | 0.0002 | 3 | 0.6000 ± 0.1000 | 15.0 | 15.0 | 15.0 | 15.0 | 15.0 ± 10.0 |  |  |" in table
    assert "| static | 0.0002 | 0 |" in table


def test_a_whole_table_of_the_real_model_is_told_in_short(tmp_path, rows):
    """An order in which GRASS was not worse; a method on the wrong side."""
    losses = {"grass": [0.5, 0.6, 0.7], "full": [0.4, 0.5, 0.6], "static": [0.9, 0.9, 0.9]}
    write_real(
        tmp_path, "arithmetic", {name: losses.get(name, [0.6] * 3) for name in real.METHODS["arithmetic"]}
    )
    text = in_short(found_in(rows, tmp_path))
    assert (
        "arithmetic**: GRASS has a higher log-loss in all 3 orders than `full` (+0.1000); a lower log-loss in all 3 "
        "orders than `static` (-0.3000); a higher log-loss in some orders only than `lora-r8` (+0.0000), `uniform` "
        in text
    )
    assert "Methods answer -15.0 to 25.0 % correctly: differences" in text  # of made-up accuracies
    table = {name: losses.get(name, [0.6] * 3) for name in real.METHODS["commonsense"]}
    write_real(tmp_path, "commonsense", table)
    assert "-15.0 to 25.0 % correctly, where guesses are right in 25 %: differences" in in_short(
        Found.of(tmp_path)
    )


def test_a_best_rate_at_the_edge_of_the_search_is_told(tmp_path, rows):
    write_real(tmp_path, "arithmetic", {name: [0.5] * 3 for name in real.METHODS["arithmetic"]})
    assert "edge of the search" not in page(found_in(rows, tmp_path))
    of_real = read_rows(tmp_path / "arithmetic.jsonl")
    search = [r for r in of_real if r["method"] == "lora-r8" and "accuracies" not in r]
    for r in search:
        r["log_loss"] = 1.0 - r["lr"]
    for lr in (8e-4, 16e-4, 32e-4):
        of_real.append(search[0] | {"lr": lr, "log_loss": 1.0 - lr})
    write_rows(tmp_path / "arithmetic.jsonl", of_real)
    assert "edge of the search for lora-r8 (SmolLM2, arithmetic)." in page(Found.of(tmp_path))


def test_rows_of_the_real_model_with_other_settings_are_refused(tmp_path, monkeypatch):
    """A run of another length, or rows to which the settings do not belong."""
    write_real(tmp_path, "arithmetic", {"grass": [0.5]})
    with monkeypatch.context() as patch:
        patch.setattr(real, "STEPS", 2 * real.STEPS)
        with pytest.raises(GrassError, match="rows of arithmetic were made with other settings"):
            real.report_of(tmp_path, "arithmetic")
    rows = read_rows(tmp_path / "arithmetic.jsonl")
    write_rows(tmp_path / "arithmetic.jsonl", [*rows, rows[-1] | {"settings": "other", "order": 1}])
    with pytest.raises(GrassError, match="rows of arithmetic were made with other settings"):
        real.report_of(tmp_path, "arithmetic")
