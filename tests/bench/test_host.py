"""What a step costs the host: `python -m bench.host`.

Would catch: a benchmark that no longer runs, leaves the boundary to the device open afterwards, launches something
while it measures, takes another path than a GPU's, or compares with another situation's unit; a situation that
does not happen; wrong usage that is measured anyway; a clean tree called dirty since its own rows are replaced.
"""

import json

import pytest
import torch

import grass
import grass_kernels
from bench import host
from grass_kernels import _triton, inputs


def test_rows_of_every_situation_and_optimizer(tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    assert host.main(["--seconds", "0.4", "--tensors", "4", "6", "--out", str(out)]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    names = [
        "addresses",
        "grass",
        "grass clipping",
        "grass exact bf16",
        "torch fused",
        "torch foreach",
        "torch single",
    ]
    expected = [(n, situation, name) for n in (4, 6) for situation in host.SITUATIONS for name in names]
    assert [(row["tensors"], row["situation"], row["variant"]) for row in rows] == expected
    units = {(r["tensors"], r["situation"]): r["seconds_median"] for r in rows if r["variant"] == "addresses"}
    for row in rows:
        assert row["suite"] == "host"
        assert 0 < row["seconds_min"] <= row["seconds_p20"] <= row["seconds_median"] <= row["seconds_p80"]
        unit = units[row["tensors"], row["situation"]]
        assert row["ratio_to_addresses"] == pytest.approx(row["seconds_median"] / unit)
        assert row["nanoseconds_a_tensor"] == pytest.approx(1e9 * row["seconds_median"] / row["tensors"])
        assert row["torch"] == torch.__version__
    assert len(capsys.readouterr().out.splitlines()) == len(rows) + 1


def test_the_tree_is_looked_at_once_before_the_rows_in_it_are_replaced(tmp_path, monkeypatch):
    """Rows that are committed are a change as soon as the file is opened."""
    out = tmp_path / "rows.jsonl"
    out.write_text("committed")
    monkeypatch.setattr(host, "describe_environment", lambda _: {"dirty": out.read_text() != "committed"})
    assert host.main(["--seconds", "0.1", "--tensors", "2", "3", "--out", str(out)]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert {row["tensors"] for row in rows} == {2, 3}
    assert not any(row["dirty"] for row in rows)


def test_it_takes_a_gpus_path_and_launches_nothing():
    boundary = (_triton.launch, inputs.copy_to_device, grass_kernels.runs_triton, torch._fused_adamw_)
    with host.no_device():
        subject = host.Subject(grass.AdamW, 3)
        work = subject.optimizer._works[None]
        (planned,) = work.planned
        assert planned.places is None  # all of them
        assert not work.by_function
        assert not work.by_torch
        before = [p.clone() for p in subject.params]
        subject.optimizer.step()
        assert subject.optimizer._works[None] is work
        assert all(torch.equal(p, q) for p, q in zip(subject.params, before, strict=True))
    assert boundary == (_triton.launch, inputs.copy_to_device, grass_kernels.runs_triton, torch._fused_adamw_)


def test_situations_are_what_they_are_called():
    with host.no_device():
        subject = host.Subject(grass.AdamW, 3)
        plan = subject.optimizer._works[None].planned[0].plan

        def prepare_and_step(situation):
            lr = subject.optimizer.param_groups[0]["lr"]
            addresses = [p.grad.data_ptr() for p in subject.params]
            subject.prepare(situation)
            moved = [p.grad.data_ptr() for p in subject.params] != addresses
            subject.call()
            assert subject.optimizer._works[None].planned[0].plan is plan
            return moved, subject.optimizer.param_groups[0]["lr"] != lr

        assert prepare_and_step("in place") == (False, False)
        assert prepare_and_step("lr changes") == (False, True)
        assert prepare_and_step("gradients move") == (True, False)
        grads = [p.grad for p in subject.params]
        prepare_and_step("after backward")
        assert all(p.grad is not g for p, g in zip(subject.params, grads, strict=True))


@pytest.mark.parametrize(
    "wrong", [["--seconds", "0"], ["--tensors", "1"], ["--tensors", "x"], ["--out", "/nowhere/rows.jsonl"]]
)
def test_wrong_usage(wrong, capsys):
    with pytest.raises(SystemExit) as exit_info:
        host.main(wrong)
    assert exit_info.value.code == 2
    assert "error:" in capsys.readouterr().err
