"""Failures these tests catch: a guess where there is doubt, an error that does not say what to pass, a tied or
shared weight that has two owners, names that change under torch.compile, adapters lost, a pattern that
takes too much.
"""

import copy
import pickle

import pytest
import torch
from torch import nn

from grass import LayerDiscoveryError, LayerMap, ParameterError
from grass.layer_discovery import candidates


class Block(nn.Module):
    def __init__(self, width=4, experts=0):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, width)
        self.experts = nn.ModuleList(Block(width) for _ in range(experts))
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))

    def forward(self, x):
        return x + self.mlp(self.up(self.norm(x)))


class Model(nn.Module):
    def __init__(self, num_blocks=3, experts=0):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.blocks = nn.ModuleList(Block(experts=experts) for _ in range(num_blocks))
        self.head = nn.Linear(4, 7, bias=False)

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


BLOCK = 2 * 4 + 3 * (4 * 4 + 4)
BLOCK_NAMES = ("norm.weight", "norm.bias", "up.weight", "up.bias", "mlp.0.weight", "mlp.0.bias", "mlp.2.weight",
               "mlp.2.bias")  # fmt: skip


def test_map_of_a_plain_model():
    layers = LayerMap.from_model(Model())
    assert layers == LayerMap(
        names=("blocks.0", "blocks.1", "blocks.2"),
        num_params=(BLOCK,) * 3,
        parameter_names=tuple(tuple(f"blocks.{i}.{name}" for name in BLOCK_NAMES) for i in range(3)),
        outside=("embed.weight", "head.weight"),
        outside_num_params=56,
    )
    assert len(layers) == 3


def test_layer_of():
    layers = LayerMap.from_model(Model())
    assert layers.layer_of("blocks.2.up.weight") == 2
    assert layers.layer_of("blocks.2._orig_mod.up.weight") == 2
    assert layers.layer_of("head.weight") is None
    with pytest.raises(ParameterError, match=r"blocks\.3\.up\.weight"):
        layers.layer_of("blocks.3.up.weight")


def test_layers_ten_and_on_keep_their_order():
    layers = LayerMap.from_model(Model(12))
    assert layers.names == tuple(f"blocks.{i}" for i in range(12))
    assert LayerMap.from_model(Model(12), "blocks.*") == layers
    assert layers.layer_of("blocks.11.up.weight") == 11


def test_assign_gives_the_models_own_parameters_once():
    model = Model()
    layers = LayerMap.from_model(model)
    twin = copy.deepcopy(model)
    assert [(name, id(p)) for name, p, _ in layers.assign(twin)] == [
        (n, id(p)) for n, p in twin.named_parameters()
    ]
    assert {name: layer for name, _, layer in layers.assign(twin)}["blocks.1.up.bias"] == 1
    twin.extra = nn.Linear(2, 2)
    with pytest.raises(ParameterError, match=r"2 unknown \['extra\.bias', 'extra\.weight'\]"):
        layers.assign(twin)


def test_modules_are_the_blocks():
    model = Model()
    layers = LayerMap.from_model(model)
    assert layers.modules(model) == tuple(model.blocks)
    with pytest.raises(ParameterError, match=r"blocks\.2"):
        layers.modules(Model(2))


def test_map_holds_no_tensor_and_survives_pickle_and_deepcopy():
    layers = LayerMap.from_model(Model())
    layers.layer_of("head.weight")
    assert pickle.loads(pickle.dumps(layers)) == layers == copy.deepcopy(layers)
    assert hash(layers) == hash(copy.deepcopy(layers))


def test_nothing_is_frozen_or_thawed():
    model = Model()
    model.blocks[1].up.weight.requires_grad_(False)
    before = [p.requires_grad for p in model.parameters()]
    LayerMap.from_model(model)
    assert [p.requires_grad for p in model.parameters()] == before


# Sharing


def test_tied_embedding_counts_once():
    model = Model()
    model.head.weight = model.embed.weight
    layers = LayerMap.from_model(model)
    assert layers.outside == ("embed.weight",)
    assert layers.outside_num_params == 28
    assert layers.tied == (("head.weight", "embed.weight"),)
    assert layers.layer_of("head.weight") is None


def test_weight_shared_by_two_layers_is_outside():
    model = Model()
    model.blocks[2].up.weight = model.blocks[0].up.weight
    layers = LayerMap.from_model(model)
    assert layers.num_params == (BLOCK - 16, BLOCK, BLOCK - 16)
    assert layers.outside == ("embed.weight", "blocks.0.up.weight", "head.weight")
    assert layers.layer_of("blocks.2.up.weight") is None


def test_weight_shared_by_a_layer_and_the_head_is_outside():
    model = Model()
    model.blocks[2].up.weight = model.head.weight = nn.Parameter(torch.zeros(4, 4))
    assert LayerMap.from_model(model).layer_of("head.weight") is None
    assert LayerMap.from_model(model).num_params == (BLOCK, BLOCK, BLOCK - 16)


def test_weight_shared_within_a_layer_stays_in_it():
    model = Model()
    model.blocks[1].up.weight = model.blocks[1].mlp[0].weight
    layers = LayerMap.from_model(model)
    assert layers.num_params == (BLOCK, BLOCK - 16, BLOCK)
    assert layers.layer_of("blocks.1.mlp.0.weight") == layers.layer_of("blocks.1.up.weight") == 1


def test_block_that_stands_twice_is_one_layer():
    model = Model()
    model.blocks = nn.ModuleList([model.blocks[0], model.blocks[0], model.blocks[1], model.blocks[1]])
    for pattern in (None, "blocks.*", list(model.blocks)):
        layers = LayerMap.from_model(model, pattern)
        assert layers.names == ("blocks.0", "blocks.2")
        assert layers.num_params == (BLOCK, BLOCK)


def test_second_name_of_a_block_does_not_make_it_shared():
    model = nn.Module()
    inner = Model()
    model.first = inner.blocks[0]
    model.inner = inner
    model.again = inner.blocks
    layers = LayerMap.from_model(model, "inner.blocks.*")
    assert layers.num_params == (BLOCK,) * 3
    assert layers.parameter_names[0][0] == "first.norm.weight"
    assert [layer for _, _, layer in layers.assign(model)].count(0) == len(BLOCK_NAMES)


def test_layer_without_parameters_of_its_own_is_refused():
    model = Model()
    for name in ("norm", "up", "mlp"):
        setattr(model.blocks[2], name, getattr(model.blocks[0], name))
    with pytest.raises(LayerDiscoveryError, match=r"'blocks\.0' owns no parameter"):
        LayerMap.from_model(model)


def test_children_without_parameters_are_no_layers():
    model = Model(4)
    model.blocks[1] = nn.Identity()
    assert LayerMap.from_model(model).names == ("blocks.0", "blocks.2", "blocks.3")


# What is a stack, and which


def test_experts_and_other_lists_inside_blocks_belong_to_their_block():
    layers = LayerMap.from_model(Model(experts=5))
    assert layers.names == ("blocks.0", "blocks.1", "blocks.2")
    assert layers.num_params == (6 * BLOCK,) * 3


def test_lists_of_single_modules_give_way_to_blocks():
    model = Model()
    model.heads = nn.ModuleList(nn.Linear(4, 4) for _ in range(6))
    assert LayerMap.from_model(model).names == ("blocks.0", "blocks.1", "blocks.2")


def test_a_list_of_single_modules_alone_is_a_stack():
    model = nn.Module()
    model.maps = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
    assert LayerMap.from_model(model).names == ("maps.0", "maps.1", "maps.2")


def test_stem_and_head_of_a_sequential_are_outside():
    class Stem(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.positions = nn.Embedding(7, 4), nn.Embedding(9, 4)

    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.out = nn.Linear(4, 7)

    model = nn.Sequential(nn.Embedding(7, 4), Stem(), Block(), Block(), nn.LayerNorm(4), Head())
    assert LayerMap.from_model(model).names == ("2", "3")


def test_blocks_of_different_classes_in_a_list_are_all_layers():
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.mixer = nn.Linear(3, 3)

    model = Model()
    model.blocks.insert(1, Other())
    assert LayerMap.from_model(model).names == tuple(f"blocks.{i}" for i in range(4))


def test_two_stacks_are_doubt_and_the_message_lists_both():
    model = Model()
    model.vision = Model(5)
    with pytest.raises(LayerDiscoveryError) as caught:
        LayerMap.from_model(model)
    lines = [" ".join(line.split()) for line in str(caught.value).splitlines()]
    assert f"blocks.* 3 blocks {3 * BLOCK} parameters Block" in lines
    assert f"vision.blocks.* 5 blocks {5 * BLOCK} parameters Block" in lines
    assert 'pattern="vision.blocks.*"' in lines[-1]
    assert LayerMap.from_model(model, "blocks.*").names == ("blocks.0", "blocks.1", "blocks.2")


def test_lists_of_lists_are_stages_and_no_blocks():
    model = nn.Module()
    model.stages = nn.ModuleList(nn.ModuleList(Block() for _ in range(2)) for _ in range(2))
    with pytest.raises(LayerDiscoveryError, match=r"(?s)stages\.0\.\*.*stages\.1\.\*"):
        LayerMap.from_model(model)
    names = ("stages.0.0", "stages.0.1", "stages.1.0", "stages.1.1")
    assert LayerMap.from_model(model, "stages.*.*").names == names


@pytest.mark.parametrize(
    "model",
    [
        nn.Linear(2, 2),
        nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)),
        nn.ModuleDict({"a": Block(), "b": Block()}),
        Model(num_blocks=1),
    ],
    ids=["linear", "mlp", "named children", "one block"],
)
def test_no_repeated_blocks(model):
    with pytest.raises(LayerDiscoveryError, match=r"no repeated blocks.*\n?.*Pass pattern="):
        LayerMap.from_model(model)


def test_one_block_by_pattern():
    assert LayerMap.from_model(Model(num_blocks=1), "blocks.*").names == ("blocks.0",)


# Patterns and modules


def test_several_patterns_keep_their_order():
    model = nn.ModuleDict({"encoder": Model(2), "decoder": Model(2)})
    layers = LayerMap.from_model(model, ["decoder.blocks.*", "encoder.blocks.*"])
    assert layers.names == ("decoder.blocks.0", "decoder.blocks.1", "encoder.blocks.0", "encoder.blocks.1")


def test_star_stays_within_one_part():
    layers = LayerMap.from_model(Model(experts=2), "blocks.*")
    assert layers.names == ("blocks.0", "blocks.1", "blocks.2")
    assert LayerMap.from_model(Model(12), "blocks.1").names == ("blocks.1",)
    assert LayerMap.from_model(Model(12), "blocks.1?").names == ("blocks.10", "blocks.11")


def test_modules_as_layers_in_the_callers_order():
    model = Model()
    assert LayerMap.from_model(model, model.blocks).names == ("blocks.0", "blocks.1", "blocks.2")
    assert LayerMap.from_model(model, [model.blocks[2], model.head]).names == ("blocks.2", "head")


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("layers.*", r"'layers\.\*' matches no module.*\n.*\n +blocks\.\*.*\n.*pattern=\"blocks\.\*\""),
        ("blocks", r"matches 'blocks', a list of modules, not a block"),
        (["blocks.*", "blocks.*.mlp"], r"'blocks\.0\.mlp' is inside 'blocks\.0'"),
        ("blocks.*.mlp.1", r"'blocks\.0\.mlp\.1' owns no parameter"),
        ([], "non-empty list"),
        ([Block()], "Block passed as a layer is not a module of the model"),
        (["blocks.*", Block()], "list of strings, or a non-empty list of modules"),
        (3, "must be a string"),
    ],
    ids=["no match", "container", "nested", "no parameters", "empty", "foreign", "mixed", "wrong type"],
)  # fmt: skip
def test_pattern_that_cannot_be(pattern, message):
    with pytest.raises(LayerDiscoveryError, match=message):
        LayerMap.from_model(Model(), pattern)


# Wrappers

# The first torch.compile imports torch's own users of TorchScript, which warn of it.
compiles = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
# peft asks transformers for a property by its old name.
adapts = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@compiles
def test_compiled_model_has_the_same_map():
    model = Model()
    plain = LayerMap.from_model(model)
    compiled = torch.compile(model)
    assert LayerMap.from_model(compiled) == plain
    assert LayerMap.from_model(compiled, "blocks.*") == plain
    assert plain.modules(compiled) == tuple(model.blocks)
    assert [name for name, _, _ in plain.assign(compiled)] == [name for name, _ in model.named_parameters()]


@compiles
def test_blocks_compiled_one_by_one_have_the_same_map():
    model = Model()
    plain = LayerMap.from_model(model)
    originals = list(model.blocks)
    model.blocks[0] = torch.compile(model.blocks[0])
    assert LayerMap.from_model(model) == plain
    for index in (1, 2):
        model.blocks[index] = torch.compile(model.blocks[index])
    assert LayerMap.from_model(model) == plain
    assert LayerMap.from_model(model, originals) == LayerMap.from_model(model, model.blocks) == plain
    assert plain.modules(model) == tuple(model.blocks)


def tiny_llama(**settings):
    transformers = pytest.importorskip("transformers", reason="peft and wrappers are tried on a real model")
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        **settings,
    )
    return transformers.LlamaForCausalLM(config)


@adapts
@pytest.mark.parametrize("saved", [None, ["embed_tokens", "lm_head"]], ids=["blocks only", "embedding too"])
def test_adapters_belong_to_their_block(saved):
    peft = pytest.importorskip("peft", reason="adapters come from peft")
    plain = LayerMap.from_model(tiny_llama())
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], modules_to_save=saved)
    layers = LayerMap.from_model(peft.get_peft_model(tiny_llama(), config))
    assert layers.names == tuple(f"base_model.model.{name}" for name in plain.names)
    assert layers.num_params == tuple(size + 4 * 2 * 16 for size in plain.num_params)
    assert layers.layer_of("base_model.model.model.layers.1.self_attn.q_proj.lora_A.default.weight") == 1
    assert layers.layer_of("base_model.model.model.layers.1.self_attn.q_proj.base_layer.weight") == 1
    assert len(layers.outside) == (3 if saved is None else 5)


def test_model_inside_a_users_module():
    outer = nn.Module()
    outer.policy = tiny_llama()
    outer.backbone = outer.policy.model
    outer.value = nn.ModuleList(Block() for _ in range(3))
    layers = LayerMap.from_model(outer)
    assert layers.names == tuple(f"policy.model.layers.{i}" for i in range(3))
    outer.reference = tiny_llama()
    with pytest.raises(LayerDiscoveryError, match=r"2 language models \('policy', 'reference'\)"):
        LayerMap.from_model(outer)


def test_pruned_model_needs_no_word_to_its_configuration():
    model = tiny_llama()
    model.model.layers = model.model.layers[:2]
    assert LayerMap.from_model(model).names == ("model.layers.0", "model.layers.1")


def test_module_added_to_a_language_model_does_not_pass_for_its_blocks():
    model = tiny_llama()
    model.model.memory = Model(3)
    assert LayerMap.from_model(model).names == tuple(f"model.layers.{i}" for i in range(3))
    # Pruned, the blocks no longer have the announced length, and the addition has: place against length.
    model.model.layers = model.model.layers[:2]
    with pytest.raises(LayerDiscoveryError, match=r"(?s)model\.layers\.\*.*model\.memory\.blocks\.\*"):
        LayerMap.from_model(model)


def backbone(name: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    widths = {"hidden_sizes": [8, 16, 32, 64]}
    swin = {"embed_dim": 24, "depths": [2, 2, 6, 2], "num_heads": [1, 2, 4, 8]}
    model, options = {
        "Swin": ("SwinForImageClassification", swin),
        "Swinv2": ("Swinv2ForImageClassification", {**swin, "depths": [1, 1, 3, 1]}),
        "Segformer": ("SegformerForImageClassification", widths),
        "ConvNext": ("ConvNextForImageClassification", widths),
    }[name]
    with torch.device("meta"):
        return getattr(transformers, model)(getattr(transformers, f"{name}Config")(**options))


@pytest.mark.parametrize(
    ("name", "first", "last", "count"),
    [
        ("Swin", "swin.encoder.layers.0.blocks.0", "swin.encoder.layers.3.blocks.1", 12),
        ("Swinv2", "swinv2.encoder.layers.0.blocks.0", "swinv2.encoder.layers.3.blocks.0", 6),
        ("Segformer", "segformer.stages.0.blocks.0", "segformer.stages.3.blocks.1", 8),
        ("ConvNext", "convnext.encoder.stages.0.layers.0", "convnext.encoder.stages.3.layers.2", 18),
    ],
)
def test_blocks_are_found_inside_the_stages_of_a_vision_backbone(
    name: str, first: str, last: str, count: int
) -> None:
    """Stages are no layers: those of Swin had 19 thousand to 891 thousand parameters."""
    model = backbone(name)
    layers = LayerMap.from_model(model)
    assert (layers.names[0], layers.names[-1], len(layers)) == (first, last, count)
    (stack,) = candidates(model)
    assert LayerMap.from_model(model, stack.pattern) == layers


def test_blocks_with_experts_are_layers_also_if_sizes_differ() -> None:
    class Dense(nn.Module):
        def __init__(self, experts: int) -> None:
            super().__init__()
            self.up = nn.Linear(4, 4)
            self.experts = nn.ModuleList(
                nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4)) for _ in range(experts)
            )

    model = nn.ModuleDict({"blocks": nn.ModuleList([Dense(0), *(Dense(8) for _ in range(3))])})
    assert LayerMap.from_model(model).names == tuple(f"blocks.{i}" for i in range(4))
