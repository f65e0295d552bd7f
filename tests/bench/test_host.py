"""The host's time of a step, and steps on the CPU: `python -m bench host`.

Would catch: a benchmark that no longer runs, or leaves the boundary to the device open afterwards; one that launches
something while it measures, or takes another path than a GPU's; a situation that does not happen; a ratio upside
down, or to the time of another situation, case or way to clip; a target called met that was missed; two sides of a
step on the CPU that do different work.
"""

import json

import pytest
import torch

import grass
import grass_kernels
from bench import cpu_step, host
from bench.__main__ import main
from grass_kernels import _triton, inputs

SMALL = [case._replace(tensors=3, numel=100) for case in cpu_step.CASES]


def test_rows_of_every_situation_and_case(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cpu_step, "CASES", SMALL)
    monkeypatch.setattr(host, "MOST", 0.1)  # some are met, some are missed
    out = tmp_path / "rows.jsonl"
    assert main(["host", "--seconds", "0.5", "--tensors", "4", "6", "--out", str(out)]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    keys = [(row.get("tensors"), row.get("situation"), row.get("case"), row.get("clip")) for row in rows]
    variants = [row["variant"] for row in rows]
    assert list(zip(keys, variants, strict=True)) == [
        *(
            ((tensors, situation, None, None), variant)
            for tensors in (4, 6)
            for situation in host.SITUATIONS
            for variant in ("grass", "grass clipping", "grass exact bf16", "torch fused")
        ),
        *(
            ((None, None, case.name, clip), variant)
            for case in SMALL
            for clip in (False, True)
            for variant in ("grass", "torch fused")
        ),
    ]
    fused = {key: row["seconds_median"] for key, row in zip(keys, rows, strict=True) if row["most"] is None}
    for key, row in zip(keys, rows, strict=True):
        assert 0 < row["seconds_min"] <= row["seconds_p20"] <= row["seconds_median"] <= row["seconds_p80"]
        assert row["ratio_to_fused"] == pytest.approx(row["seconds_median"] / fused[key])
        assert row["torch"] == torch.__version__
    ours = [row for row in rows if row["variant"] != "torch fused"]
    assert {row["most"] for row in ours} == {0.1, 1.3, 2.0}
    printed = [line for line in capsys.readouterr().out.splitlines() if line.endswith(("met", "missed"))]
    assert [line.endswith(": met") for line in printed] == [r["ratio_to_fused"] <= r["most"] for r in ours]


def test_it_takes_a_gpus_path_and_launches_nothing(monkeypatch):
    boundary = (_triton.launch, inputs.copy_to_device, grass_kernels.runs_triton, torch._fused_adamw_)
    with host.no_device():
        for name, make in host.VARIANTS.items():
            subject = make(3)
            with torch.no_grad():
                for p in subject.params:
                    p.grad.fill_(1.0)
                    p.fill_(1.0)
            subject.optimizer.step()
            assert all(bool((p == 1).all()) for p in subject.params), name
            launches = []
            with monkeypatch.context() as patch:
                patch.setattr(_triton, "launch", lambda *args, to=launches, **kwargs: to.append(args))
                subject.optimizer.step()
            assert bool(launches) is (name != "torch fused")
    assert boundary == (_triton.launch, inputs.copy_to_device, grass_kernels.runs_triton, torch._fused_adamw_)


def test_situations_are_what_they_are_called():
    with host.no_device():
        subject = host.Subject(grass.AdamW, 3)

        def prepare(situation):
            lr, grads = subject.optimizer.param_groups[0]["lr"], [p.grad for p in subject.params]
            addresses = [g.data_ptr() for g in grads]
            subject.prepare(situation)
            moved = [p.grad.data_ptr() for p in subject.params] != addresses
            subject.optimizer.step()
            fresh = all(p.grad is not g for p, g in zip(subject.params, grads, strict=True))
            return subject.optimizer.param_groups[0]["lr"] != lr, moved, fresh

        assert prepare("in place") == (False, False, False)
        assert prepare("lr changes") == (True, False, False)
        assert prepare("gradients move") == (False, True, True)
        assert prepare("after backward")[::2] == (False, True)


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
@pytest.mark.parametrize("clip", [False, True])
def test_both_sides_of_a_step_on_the_cpu_do_the_same_work(case, clip):
    results = []
    for variant in (cpu_step.GRASS, cpu_step.FUSED):
        optimizer, step = cpu_step.make_step(case, variant, clip=clip)
        step()
        step()
        assert isinstance(optimizer, grass.AdamW) is (variant == cpu_step.GRASS)
        assert optimizer.param_groups[0]["fused"] or variant == cpu_step.GRASS
        assert len(optimizer.param_groups) == (case.tensors if case.groups else 1)
        assert len({group["lr"] for group in optimizer.param_groups}) == (case.tensors if case.own_lr else 1)
        params = [p for group in optimizer.param_groups for p in group["params"]]
        assert [(p.numel(), p.dtype) for p in params] == [(case.numel, case.dtype)] * case.tensors
        moments = [optimizer.state[p]["exp_avg"] for p in params]
        if variant == cpu_step.GRASS:
            assert {m.dtype for m in moments} == {case.state_dtype or torch.float32}
        results.append([t.double().norm() for t in (*params, *moments)])
    torch.testing.assert_close(*results, rtol=1e-5 if case.dtype == torch.float32 else 1e-2, atol=0.0)
