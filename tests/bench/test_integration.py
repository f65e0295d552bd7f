"""A step in Trainer: `python -m bench integration`.

Would catch: a benchmark that no longer runs; sides that train different models, on different data or by different
settings; a side of GRASS that probes, freezes a layer, or has lost its callback; a side of torch that is not the fused
AdamW; a ratio upside down; turns that are not of the same length.
"""

import json

import pytest
import torch

import grass
from bench import integration
from bench.__main__ import main
from bench.cpu_step import FUSED, GRASS
from grass.integrations.transformers import GrassCallback

SMALL = integration.Size(layers=2, hidden=16, intermediate=24, vocabulary=16, batch=2, tokens=4)


def test_rows_of_both_sides(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(integration, "CASES", (SMALL, SMALL._replace(batch=1)))
    monkeypatch.setattr(integration, "STEPS", 3)
    out = tmp_path / "rows.jsonl"
    assert main(["integration", "--seconds", "0.1", "--out", str(out)]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    cases = [str(case) for case in integration.CASES]
    assert [(row["case"], row["variant"]) for row in rows] == [(c, v) for c in cases for v in (GRASS, FUSED)]
    for ours, fused in zip(rows[::2], rows[1::2], strict=True):
        assert ours["ratio_to_fused"] == pytest.approx(ours["seconds_median"] / fused["seconds_median"])
        assert (ours["most"], fused["most"]) == (1.03, None)
        assert ours["turns"] >= 2
        assert ours["samples"] == fused["samples"] == 3 * ours["turns"]
        assert ours["ratio_p20"] <= ours["ratio_p80"]
        assert ours["torch"] == torch.__version__
    printed = [line for line in capsys.readouterr().out.splitlines() if line.endswith(("met", "missed"))]
    assert [line.endswith(": met") for line in printed] == [r["ratio_to_fused"] <= 1.03 for r in rows[::2]]


def test_both_sides_train_the_same(tmp_path):
    sides = {variant: integration.Side(variant, SMALL, str(tmp_path)) for variant in (GRASS, FUSED)}
    for _ in range(2):
        assert [len(side.turn()) for side in sides.values()] == [integration.STEPS] * 2
    ours, theirs = (side.trainer for side in sides.values())
    method = ours.optimizer.optimizer
    assert isinstance(method, grass.GrassAdamW)
    assert method.step_count == 2 * (integration.STEPS + integration._UNTIMED)
    assert (method.phase, method.active_layers, method.config.probe_steps > 0) == ("adapt", (0, 1), True)
    assert any(isinstance(callback, GrassCallback) for callback in ours.callback_handler.callbacks)
    fused = theirs.optimizer.optimizer
    assert type(fused) is torch.optim.AdamW
    assert fused.param_groups[0]["fused"]
    for p, q in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    before = integration.Side(FUSED, SMALL, str(tmp_path)).trainer.model
    assert not torch.equal(next(before.parameters()), next(theirs.model.parameters()))
