"""Failures these tests catch: gradients that differ from those without checkpoints; parts of frozen layers, or of
evaluation, that are computed once more than needed; activations that a checkpoint should have dropped and something
still holds; copies of a model that compute with the original's weights; checkpoints within checkpoints.
"""

import copy
import pickle
import weakref
from collections import Counter

import pytest
import torch
from torch import nn

import grass
from grass.activation_checkpointing import checkpoint_activations
from grass.layers import LayerMap
from tests.support import tiny

transformers = pytest.importorskip("transformers", reason="checkpoints are of transformers models")


def gpt2(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    rates = dict.fromkeys(("attn_pdrop", "resid_pdrop", "embd_pdrop"), dropout)
    sizes = {"vocab_size": tiny.VOCAB, "n_embd": tiny.WIDTH, "n_layer": 3, "n_head": 2, "n_positions": 32}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **rates))


def opt() -> nn.Module:
    """Linear maps directly in the layer, and attention is its largest part."""
    torch.manual_seed(0)
    sizes = {
        "hidden_size": tiny.WIDTH,
        "word_embed_proj_dim": tiny.WIDTH,
        "ffn_dim": 24,
        "num_hidden_layers": 3,
    }
    config = transformers.OPTConfig(
        **sizes, vocab_size=tiny.VOCAB, num_attention_heads=2, max_position_embeddings=32, dropout=0.0
    )
    return transformers.OPTForCausalLM(config)


def mixtral() -> nn.Module:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": tiny.WIDTH,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_local_experts": 4,
    }
    config = transformers.MixtralConfig(
        **sizes,
        vocab_size=tiny.VOCAB,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
    )
    return transformers.MixtralForCausalLM(config)


FAMILIES = {"llama": tiny.llama, "gpt2": gpt2, "opt": opt, "mixtral": mixtral}


def inside(model: nn.Module) -> nn.Module:
    checkpoint_activations(model, LayerMap.from_model(model))
    return model.train()


def gradients(model: nn.Module) -> list[torch.Tensor | None]:
    torch.manual_seed(3)  # of dropout
    tiny.loss_of(model, tiny.batch(0)).backward()
    return [p.grad for p in model.parameters()]


def calls_by_layer(model: nn.Module, part: str) -> Counter[int]:
    """Counts, from now on, how often a part of each layer is computed."""
    calls: Counter[int] = Counter()
    for index, layer in enumerate(model.model.layers):
        linear = next(m for m in layer.get_submodule(part).modules() if isinstance(m, nn.Linear))
        linear.register_forward_hook(lambda m, i, o, index=index: calls.update([index]))
    return calls


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_without_checkpoints(family: str) -> None:
    plain, checkpointed = FAMILIES[family]().train(), inside(FAMILIES[family]())
    tiny.assert_identical(gradients(plain), gradients(checkpointed))


def test_dropout_is_drawn_once() -> None:
    plain, checkpointed = (gpt2(dropout=0.5).train() for _ in range(2))
    tiny.assert_identical(gradients(plain), gradients(inside(checkpointed)))
    plain.eval()
    assert not torch.equal(gradients(plain)[0], gradients(checkpointed)[0])  # there was dropout


def test_only_parts_of_layers_that_train_are_computed_once_more() -> None:
    model = inside(tiny.llama(layers=3))
    for layer in (0, 2):
        model.model.layers[layer].requires_grad_(False)
    attention, mlp = calls_by_layer(model, "self_attn"), calls_by_layer(model, "mlp")
    gradients(model)
    assert attention == {0: 2, 1: 3, 2: 2}
    assert mlp == {0: 2, 1: 2, 2: 2}


def test_a_second_call_changes_nothing() -> None:
    model = inside(tiny.llama(layers=2))
    before = [layer.self_attn.forward for layer in model.model.layers]
    inside(model)
    assert [layer.self_attn.forward for layer in model.model.layers] == before


@pytest.mark.parametrize("how", ["eval", "no_grad"])
def test_evaluation_computes_everything_once(how: str) -> None:
    model = inside(tiny.llama(layers=2))
    attention = calls_by_layer(model, "self_attn")
    if how == "eval":
        gradients(model.eval())
    else:
        with torch.no_grad():
            tiny.loss_of(model, tiny.batch(0))
    assert set(attention) == {0, 1}
    assert attention[0] == attention[1] == 1


def test_nothing_of_a_layer_outlives_forward() -> None:
    """Attention is given its input by name; a checkpoint within a checkpoint kept it, a tensor a layer."""
    model = inside(tiny.llama(layers=3))
    outputs: list[weakref.ref[torch.Tensor]] = []
    for layer in model.model.layers:
        layer.input_layernorm.register_forward_hook(lambda m, i, o: outputs.append(weakref.ref(o)))
        layer.post_attention_layernorm.register_forward_hook(lambda m, i, o: outputs.append(weakref.ref(o)))
    loss = tiny.loss_of(model, tiny.batch(0))
    assert len(outputs) == 6
    assert [ref() for ref in outputs] == [None] * 6
    loss.backward()


@pytest.mark.parametrize("way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_compute_with_their_own_weights(way) -> None:
    model = inside(tiny.llama())
    model.disable_input_require_grads()  # a hook of transformers that cannot be pickled
    other = way(model)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    attention = calls_by_layer(other, "self_attn")
    tiny.assert_identical(gradients(other), gradients(tiny.llama().train()))
    assert set(attention.values()) == {3}


def test_fused_training_is_the_same_to_the_bit() -> None:
    def trained(model: nn.Module) -> tuple[dict[str, torch.Tensor], dict]:
        config = tiny.config(fused_backward=True, offload="streamed", buffer_mb=1)
        opt = grass.GrassAdamW(model, lr=1e-2, config=config)
        tiny.train(model, opt, 0, 12)
        return tiny.weights(model), opt.state_dict()

    whole = tiny.llama().train()
    checkpoint_activations(whole)
    tiny.assert_identical(trained(inside(tiny.llama())), trained(whole))
