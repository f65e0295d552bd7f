"""The chunked loss beside the model's own.

Would catch: labels not shifted, ignored ones counted, or a sum divided by the wrong number of tokens, also over the
micro-batches of a step; gradients that differ, or appear at frozen weights, or are lost where head and embedding
are one; a bfloat16 loss added up in bfloat16; logits of a whole batch made after all; a model whose logits or loss
are more than the head's product silently trained on another loss; "chunked" accepted where it cannot be had, or
refused only after something was written; an option that does not reach Trainer or the held-out loss; a wrong call
of Liger.
"""

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Trainer,
)
from trl import SFTConfig
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from grass import ConfigError, GrassConfig
from grass.finetune import loss as loss_module
from grass.finetune.encoding import IGNORED, Example, to_dataset
from grass.finetune.evaluation import heldout_loss
from grass.finetune.job import start_run
from grass.finetune.loss import chunked_loss, use_chunked_loss, why_not_chunked
from grass.finetune.options import FinetuneOptions
from grass.finetune.run_folder import read_rows
from grass.finetune.screen import Screen, quiet_libraries
from grass.finetune.training import GrassTrainer
from tests.support.tiny import VOCAB, checkpoint_activations, llama

pytestmark = pytest.mark.skipif(
    not hasattr(nn, "LinearCrossEntropyOptions"), reason="torch before 2.13 has no chunked loss"
)
SMALL = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
GATED = {**SMALL, "intermediate_size": 24, "num_key_value_heads": 2, "pad_token_id": 0}


@pytest.fixture(autouse=True)
def quiet():
    with quiet_libraries():
        yield


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    # Several chunks, the last one not full: the batches below have 18 tokens.
    monkeypatch.setattr(loss_module, "CHUNK_TOKENS", 4)


def make_batch(seed=0, size=2, length=9):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCAB, (size, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[-1, length - 3 :] = 0
    labels = torch.where(mask == 0, IGNORED, ids)
    labels[:, :2] = IGNORED
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def loss_and_gradients(model, batch, chunked, **options):
    model.zero_grad()
    loss = chunked_loss(model, batch, **options) if chunked else model(**batch, **options).loss
    if loss.requires_grad:
        loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_equal_to_full(model, batch, tolerance=2e-6, **options):
    expected, expected_grads = loss_and_gradients(model, batch, False, **options)
    found, grads = loss_and_gradients(model, batch, True, **options)
    assert found.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=0)
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        error = (grad.double() - expected_grads[name].double()).norm() / expected_grads[name].double().norm()
        assert error < tolerance, name
    return grads


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("num_items", [None, 5, torch.tensor(37)])
def test_loss_and_gradients_are_the_full_loss_s(tied, num_items):
    options = {} if num_items is None else {"num_items_in_batch": num_items}
    assert assert_equal_to_full(llama(tied=tied).train(), make_batch(), **options)


def test_a_head_with_bias():
    model = PhiForCausalLM(PhiConfig(**GATED, max_position_embeddings=32))
    nn.init.normal_(model.lm_head.bias)
    assert "lm_head.bias" in assert_equal_to_full(model.eval(), make_batch())


def test_bfloat16_loses_no_more_than_the_full_loss():
    exact = llama(seed=3)
    model = deepcopy(exact).bfloat16()
    exact.load_state_dict(model.state_dict())
    batch = make_batch(size=16, length=24)
    loss, grads = loss_and_gradients(exact, batch, False)
    errors = {}
    for chunked in (False, True):
        found, found_grads = loss_and_gradients(model, batch, chunked)
        assert found.dtype == torch.float32
        # 96 chunks: added up in bfloat16 the loss is several percent off
        torch.testing.assert_close(found, loss, rtol=2e-3, atol=0)
        errors[chunked] = {
            n: float((g.float() - grads[n]).norm() / grads[n].norm()) for n, g in found_grads.items()
        }
    assert errors[True].keys() == errors[False].keys()
    for name, error in errors[True].items():
        assert error < 2 * errors[False][name] + 1e-3, name


@pytest.mark.parametrize("num_items", [None, 7])
def test_a_batch_that_teaches_nothing_is_as_in_transformers(num_items):
    batch = make_batch()
    batch["labels"] = torch.full_like(batch["labels"], IGNORED)
    options = {} if num_items is None else {"num_items_in_batch": num_items}
    expected, _ = loss_and_gradients(llama(), batch, False, **options)
    found, grads = loss_and_gradients(llama(), batch, True, **options)
    torch.testing.assert_close(found, expected, equal_nan=True)
    assert all(not grad.any() for grad in grads.values())


def test_frozen_weights_get_no_gradient_and_change_none():
    model = llama()
    model.lm_head.requires_grad_(False)
    assert "lm_head.weight" not in assert_equal_to_full(model, make_batch())
    model.requires_grad_(False)
    model.lm_head.requires_grad_(True)
    assert assert_equal_to_full(model, make_batch()).keys() == {"lm_head.weight"}
    model.requires_grad_(False)
    assert not assert_equal_to_full(model, make_batch())


def test_activation_checkpointing():
    model = llama()
    checkpoint_activations(model, reentrant=False)
    assert assert_equal_to_full(model, make_batch())


def test_autocast_computes_the_product_in_its_type(monkeypatch):
    model, batch, seen = llama(), make_batch(), []
    original = F.linear_cross_entropy

    def spy(hidden, weight, *args, **options):
        seen.append((hidden.dtype, weight.dtype))
        return original(hidden, weight, *args, **options)

    monkeypatch.setattr(F, "linear_cross_entropy", spy)
    with torch.autocast("cpu", torch.bfloat16):
        loss, grads = loss_and_gradients(model, batch, True)
        expected, _ = loss_and_gradients(model, batch, False)
    assert seen == [(torch.bfloat16, torch.bfloat16)]
    torch.testing.assert_close(loss, expected, rtol=2e-3, atol=0)
    assert grads["lm_head.weight"].dtype == torch.float32


def largest_allocation(model, batch, chunked):
    # Not a dispatch mode: it would see torch's function as one operator, and nothing of what happens inside.
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        loss_and_gradients(model, batch, chunked)
    return max(event.self_cpu_memory_usage for event in profiler.events())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_logits_of_a_batch_are_never_there_at_once(dtype):
    vocabulary, tokens = 2048, 8 * 32
    model = llama(layers=1, vocab_size=vocabulary).to(dtype)
    batch = make_batch(size=8, length=32)
    logits = tokens * vocabulary * dtype.itemsize
    assert largest_allocation(model, batch, chunked=False) >= logits
    assert largest_allocation(model, batch, chunked=True) <= 4 * max(4, 16) * vocabulary < logits


def test_trainer_s_normalisation_over_micro_batches(tmp_path, tokenizer):
    lengths = [3, 9, 5, 4, 9, 2, 7, 6, 3, 8, 5, 4]
    rows = [make_batch(seed, 1, length + 3) for seed, length in enumerate(lengths)]
    examples = [Example(b["input_ids"][0].tolist(), b["labels"][0].tolist()) for b in rows]
    results = []
    for chunked in (None, False, True):
        model = llama(layers=2)
        arguments = {
            "model": model,
            "args": SFTConfig(
                output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=3,
                save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True, bf16=False, max_grad_norm=0.0,
                lr_scheduler_type="constant", learning_rate=0.5, dataloader_pin_memory=False,
                gradient_checkpointing=False, dataset_kwargs={"skip_prepare_dataset": True},
            ),
            "train_dataset": to_dataset(examples),
            "optimizers": (torch.optim.SGD(model.parameters(), lr=0.5), None),
        }  # fmt: skip
        if chunked is None:  # transformers' own trainer and loss
            trainer = Trainer(**arguments, data_collator=DataCollatorForLanguageModeling(0))
        else:
            trainer = GrassTrainer(
                SimpleNamespace(), None, chunked, 0, **arguments, processing_class=tokenizer
            )
        results.append((trainer.train().training_loss, model.state_dict()))
    (expected, weights), *others = results
    for found, other_weights in others:
        assert found == pytest.approx(expected, rel=1e-5)
        for name, weight in weights.items():
            torch.testing.assert_close(other_weights[name], weight, rtol=1e-4, atol=1e-6, msg=name)


def test_heldout_loss_is_the_same():
    examples = [
        Example(b["input_ids"][0].tolist(), b["labels"][0].tolist()) for b in map(make_batch, range(5))
    ]
    model = llama()
    expected = heldout_loss(model, examples, 2, 0)
    assert heldout_loss(model, examples, 2, 0, chunked=True) == pytest.approx(expected, rel=1e-6)


def gemma2():
    return Gemma2ForCausalLM(Gemma2Config(**GATED, head_dim=8))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: llama(), None),
        (lambda: llama(tied=True), None),
        (lambda: GPT2LMHeadModel(GPT2Config(**SMALL, bos_token_id=1, eos_token_id=1)), None),
        (lambda: MixtralForCausalLM(MixtralConfig(**GATED, num_local_experts=2)), None),
        (gemma2, "softcapping"),
        (lambda: CohereForCausalLM(CohereConfig(**GATED, eos_token_id=1)), "scaling"),
        (lambda: GraniteForCausalLM(GraniteConfig(**GATED, logits_scaling=8.0)), "scaling"),
        (
            lambda: MixtralForCausalLM(MixtralConfig(**GATED, num_local_experts=2, output_router_logits=True)),
            "next token alone",
        ),
    ],
    ids=["llama", "tied", "gpt2", "mixtral", "softcapping", "logit scale", "logits scaling", "auxiliary loss"],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_whose_loss_is_another_are_told_apart(make, reason, dtype):
    model = make().to(dtype).train()
    state = torch.get_rng_state()
    found = why_not_chunked(model)
    assert found is None if reason is None else reason in found
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


class _LowRankHead(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 0.0 * x.sum()


def test_a_model_that_is_no_decoder_with_a_head_is_told_apart(monkeypatch):
    model = llama()
    model.lm_head = _LowRankHead(16, VOCAB, bias=False)
    assert "plain linear layer" in why_not_chunked(model)

    model = llama()
    model.model.forward = lambda **inputs: torch.zeros(2)
    assert "cannot be run in two parts" in why_not_chunked(model)

    model = llama()
    model.model.norm.register_forward_hook(lambda module, args, out: out * (1 + torch.rand(())))
    assert "last hidden states" in why_not_chunked(model)

    model = llama()
    with monkeypatch.context() as patch:
        patch.setattr(loss_module, "_summed_cross_entropy", lambda *args: torch.tensor(1.0))
        assert "where the model's own is" in why_not_chunked(model)


def test_auto_is_chunked_where_it_pays(monkeypatch):
    said = []
    model = llama()
    assert not use_chunked_loss(model, "auto", said.append)  # a small vocabulary
    assert not use_chunked_loss(model, "full", said.append)
    assert use_chunked_loss(model, "chunked", said.append)
    monkeypatch.setattr(loss_module, "LEAST_VOCABULARY", VOCAB)
    assert use_chunked_loss(model, "auto", said.append)
    assert not use_chunked_loss(llama().bfloat16(), "auto", said.append)  # slow on a CPU
    assert use_chunked_loss(llama().bfloat16(), "chunked", said.append)
    assert said == []
    assert not use_chunked_loss(gemma2(), "auto", said.append)
    assert len(said) == 1
    assert "softcapping" in said[0]
    with pytest.raises(ConfigError, match=r"softcapping.*--loss full"):
        use_chunked_loss(gemma2(), "chunked", said.append)


def test_an_older_torch_is_named_with_the_remedy(monkeypatch):
    monkeypatch.delattr(nn, "LinearCrossEntropyOptions")
    monkeypatch.setattr(loss_module, "LEAST_VOCABULARY", VOCAB)
    said = []
    assert not use_chunked_loss(llama(), "auto", said.append)
    assert "2.13" in said[0]
    with pytest.raises(ConfigError, match=r"install torch 2\.13 or newer, or liger-kernel"):
        use_chunked_loss(llama(), "chunked", said.append)


def test_liger_is_called_as_it_wants(monkeypatch):
    calls = []

    def liger(input, weight, target, bias=None, ce_weight=None, ignore_index=-100, lse_square_scale=0.0,
              label_smoothing=0.0, reduction="mean", softcap=None):  # fmt: skip
        calls.append(reduction)
        logits = F.linear(input, weight, bias).float()
        return F.cross_entropy(logits, target, ignore_index=ignore_index, reduction=reduction)

    monkeypatch.setattr(loss_module, "_liger", lambda device: liger)
    monkeypatch.delattr(nn, "LinearCrossEntropyOptions")  # it needs none of torch's
    assert why_not_chunked(llama()) is None
    assert assert_equal_to_full(llama(), make_batch(), num_items_in_batch=5)
    assert calls == ["sum", "sum"]


@pytest.fixture
def options(tiny_model, problem_files, tmp_path):
    return FinetuneOptions(
        model=str(tiny_model), data=str(problem_files[0]), eval=str(problem_files[1]), template="plain", steps=6,
        batch_size=4, gradient_accumulation=2, lr=1e-2, log_steps=1, save_steps=0, eval_steps=3, eval_answers=0,
        output=str(tmp_path / "run"),
    )  # fmt: skip


def test_a_run_computes_every_loss_in_chunks_and_learns_the_same(options, tmp_path, monkeypatch):
    config = GrassConfig(active_layers=1, probe_steps=2, sample_interval=2, update_interval=4, seed=5)
    losses = {}
    for loss in ("full", "chunked"):
        start_run(replace(options, loss=loss, output=str(tmp_path / loss)), config, Screen())
        rows = read_rows(tmp_path / loss / "metrics.jsonl")
        losses[loss] = [row[key] for row in rows for key in ("loss", "heldout_loss") if key in row]
    assert len(losses["full"]) == 6 + 3  # each step's; held out before, after, and between
    assert losses["chunked"] == pytest.approx(losses["full"], rel=1e-3)

    # From here on a head that is called, and so makes a batch's logits, fails.
    monkeypatch.setattr(loss_module, "why_not_chunked", lambda model: None)
    monkeypatch.setattr(nn.Linear, "forward", _refuse_head(nn.Linear.forward))
    start_run(replace(options, loss="chunked", output=str(tmp_path / "again")), config, Screen())
    with pytest.raises(RuntimeError, match="logits"):
        start_run(replace(options, loss="full", output=str(tmp_path / "refused")), config, Screen())


def _refuse_head(forward):
    def refuse(self, x):
        if self.out_features > 32:  # wider than any layer of the tiny model
            raise RuntimeError("logits")
        return forward(self, x)

    return refuse


def test_chunked_is_refused_before_anything_is_written(options, tokenizer, tmp_path):
    folder = tmp_path / "gemma"
    Gemma2ForCausalLM(
        Gemma2Config(**{**GATED, "vocab_size": len(tokenizer)}, head_dim=8, max_position_embeddings=64)
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with pytest.raises(ConfigError, match="softcapping"):
        start_run(replace(options, model=str(folder), loss="chunked"), GrassConfig(active_layers=1), Screen())
    assert not Path(options.output).exists()


def test_an_unknown_loss_is_refused():
    with pytest.raises(ConfigError, match="auto, full, chunked"):
        FinetuneOptions(loss="fast")
