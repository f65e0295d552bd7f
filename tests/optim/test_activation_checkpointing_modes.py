"""Failures these tests catch: gradients lost under activation checkpointing when the embedding is frozen, by
the method or by the user; a mode of checkpointing that changes what is trained; a hook that makes an
embedding's output require grad where nothing needs it, or in evaluation; backward that runs below the lowest
active layer without need; copies whose embedding hook looks at the original.
"""

import copy
import pickle

import pytest
import torch
from torch import nn

import grass
from tests.support import tiny

# torch's advice about inputs without grad is the very case these tests make on purpose
pytestmark = [
    pytest.mark.slow,
    pytest.mark.plain_only(reason="not about kernels, and slow in the interpreter"),
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning"),
]


def trained(
    reentrant: bool | None, always: object = "outside", steps: int = 12, freeze_embedding: bool = False
) -> tuple[nn.Module, grass.GrassAdamW]:
    model = tiny.llama(layers=4)
    if reentrant is not None:
        tiny.checkpoint_activations(model, reentrant)
    if freeze_embedding:
        model.get_input_embeddings().requires_grad_(False)
    opt = grass.GrassAdamW(model, lr=1e-2, config=tiny.config(always_active=always))
    tiny.train(model, opt, 0, steps, micro_batches=2)
    return model, opt


@pytest.mark.parametrize("always", ["outside", "none", ["lm_head*"]], ids=str)
@pytest.mark.parametrize("freeze_embedding", [False, True])
def test_both_modes_train_exactly_what_no_checkpointing_does(always: object, freeze_embedding: bool) -> None:
    plain = trained(None, always, freeze_embedding=freeze_embedding)
    assert plain[1].importance.min() > 0
    assert sum(bool(s) for s in plain[1].state.values()) > 9
    for reentrant in (False, True):
        model, opt = trained(reentrant, always, freeze_embedding=freeze_embedding)
        assert opt.draw_counts == plain[1].draw_counts
        torch.testing.assert_close(opt.importance, plain[1].importance, rtol=1e-5, atol=0)
        for (name, p), q in zip(model.named_parameters(), plain[0].parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5, msg=name)


def embedding_output_requires_grad(model: nn.Module) -> bool:
    seen = []
    handle = model.get_input_embeddings().register_forward_hook(lambda m, i, o: seen.append(o.requires_grad))
    tiny.loss_of(model, tiny.batch(0))
    handle.remove()
    return seen[0]


def test_the_embeddings_output_requires_grad_only_where_it_must() -> None:
    for reentrant, wanted in ((None, False), (False, False), (True, True)):
        model, opt = trained(reentrant, "none", steps=4)
        model.train()
        assert embedding_output_requires_grad(model) == wanted
        model.eval()
        assert not embedding_output_requires_grad(model)
        model.train()
        with torch.no_grad():
            assert not embedding_output_requires_grad(model)
        opt.release()
        model.get_input_embeddings().requires_grad_(False)
        assert not embedding_output_requires_grad(model)


@pytest.mark.parametrize("reentrant", [None, False])
def test_backward_ends_at_the_lowest_active_layer(reentrant: bool | None) -> None:
    model = tiny.llama(layers=4)
    if reentrant is not None:
        tiny.checkpoint_activations(model, reentrant)
    config = tiny.config(active_layers=1, sampler="cyclic", always_active="none")
    opt = grass.GrassAdamW(model, config=config)
    for index in range(12):
        inputs = []
        handles = [
            layer.register_forward_pre_hook(
                lambda m, args, inputs=inputs: inputs.append(args[0].requires_grad)
            )
            for layer in model.model.layers
        ]
        tiny.loss_of(model, tiny.batch(index))
        for handle in handles:
            handle.remove()
        (lowest,) = opt.active_layers
        assert inputs == [layer > lowest for layer in range(4)]
        tiny.train(model, opt, index, index + 1)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copied_model_keeps_its_graph_without_the_original(how: str) -> None:
    model, opt = trained(True, "none", steps=5)
    both = copy.deepcopy((model, opt)) if how == "deepcopy" else pickle.loads(pickle.dumps((model, opt)))
    tiny.train(model, opt, 5, 9)
    expected = tiny.weights(model)
    del model, opt
    tiny.train(*both, 5, 9)
    tiny.assert_identical(tiny.weights(both[0]), expected)


def test_encoder_decoder_under_checkpointing() -> None:
    results = []
    for reentrant in (None, False, True):
        model = tiny.t5()
        if reentrant is not None:
            tiny.checkpoint_activations(model, reentrant)
        opt = grass.GrassAdamW(model, lr=1e-2, config=tiny.config(always_active="none"))
        tiny.train(model, opt, 0, 8)
        results.append((opt.importance, opt.draw_counts, list(model.parameters())))
    for importance, counts, params in results[1:]:
        torch.testing.assert_close(importance, results[0][0], rtol=1e-5, atol=0)
        assert counts == results[0][1]
        for p, q in zip(params, results[0][2], strict=True):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
