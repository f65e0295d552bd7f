"""Failures these tests catch: a trainer of TRL that takes the optimizer but not the method: no layers change, or
`fused_backward` and accumulation differ from updates after backward.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

import grass
from grass.integrations.transformers import GrassCallback, make_optimizer, trainer_optimizer
from tests.support import tiny

trl = pytest.importorskip("trl", reason="tests the integration with it")
datasets = pytest.importorskip("datasets", reason="TRL's trainers need it")

EXAMPLES = Path(__file__).parents[2] / "examples"
CONFIG = {"active_layers": 2, "probe_steps": 3, "sample_interval": 2, "update_interval": 4}
STEPS = 9

pytestmark = pytest.mark.filterwarnings("ignore")  # of the library and what it uses


@pytest.fixture(autouse=True)
def _fresh_state(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(EXAMPLES)
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def rewards(completions: list[str], **columns: Any) -> list[float]:
    return [float(len(text)) for text in completions]


def sums(kind: str) -> Any:
    from tiny_model import make_sums

    rows: list[dict[str, Any]] = []
    for number, (question, answer) in enumerate(make_sums(32)):
        wrong = str(int(answer) + 1)
        rows.append(
            {
                "sft": {"prompt": question, "completion": answer},
                "dpo": {"prompt": question, "chosen": answer, "rejected": wrong},
                "reward": {"chosen": question + answer, "rejected": question + wrong},
                "kto": {
                    "prompt": question,
                    "completion": answer if number % 2 else wrong,
                    "label": number % 2 > 0,
                },
                "grpo": {"prompt": question},
                "rloo": {"prompt": question},
            }[kind]
        )
    return datasets.Dataset.from_list(rows)


def trainer(kind: str, folder: Path, **config: Any) -> tuple[Any, torch.nn.Module]:
    from tiny_model import make_model, make_tokenizer

    name = {"sft": "SFT", "dpo": "DPO", "reward": "Reward", "kto": "KTO", "grpo": "GRPO", "rloo": "RLOO"}[
        kind
    ]
    sampling = {"num_generations": 4, "max_completion_length": 4} if kind in ("grpo", "rloo") else {}
    args = getattr(trl, f"{name}Config")(
        str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_grad_norm=0,
        learning_rate=1e-2,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **sampling,
    )
    if kind == "rloo":
        args.beta = 0.0  # no reference model, which would be loaded by name
    method = grass.GrassConfig(**CONFIG, **config)
    model = make_model()
    if kind == "reward":
        from transformers import LlamaForSequenceClassification

        torch.manual_seed(0)
        model = LlamaForSequenceClassification(
            model.config.__class__(**{**model.config.to_dict(), "num_labels": 1})
        )
    extra: dict[str, Any] = {}
    if kind in ("sft", "reward"):
        extra["optimizer_cls_and_kwargs"] = trainer_optimizer(args=args, config=method)
    else:
        extra["optimizers"] = (make_optimizer(model, args=args, config=method), None)
    if kind in ("dpo", "kto"):
        extra["ref_model"] = make_model()
    if sampling:
        extra["reward_funcs"] = rewards
    cls = getattr(trl, f"{name}Trainer")
    run = cls(model, args=args, train_dataset=sums(kind), processing_class=make_tokenizer(), **extra)
    run.add_callback(GrassCallback(run))
    return run, model


@pytest.mark.parametrize("kind", ["sft", "reward", "dpo", "kto", "grpo", "rloo"])
def test_fused_updates_train_what_updates_after_backward_train(kind: str, tmp_path: Path) -> None:
    results = []
    for fused in (False, True):
        run, model = trainer(kind, tmp_path, fused_backward=fused)
        before = tiny.weights(model)
        run.train()
        opt = run.optimizer.optimizer
        assert opt.step_count == STEPS
        assert opt.importance.min() > 0
        assert any(not torch.equal(p, before[name]) for name, p in model.named_parameters())
        rows = [row for row in run.state.log_history if "loss" in row]
        assert [row["grass/phase"] for row in rows] == [0] * 3 + [1] * (STEPS - 3)
        results.append((model, opt))
    (plain, opt), (fused_model, fused_opt) = results
    assert opt.draw_counts == fused_opt.draw_counts
    tiny.assert_identical(dict(plain.named_parameters()), dict(fused_model.named_parameters()))
