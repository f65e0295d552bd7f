"""Failures these tests catch: a vision tower, an expert list or a cross-attention list taken for the language
model's blocks; one stack of two; blocks lost in hybrids of attention and state space; a parameter
owned twice or by nobody; a shared block that goes to one of its users.

Expected places are written by hand, one line an architecture. Models are built without memory, on the meta
device, from configurations that are tiny where it costs nothing.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from grass import LayerDiscoveryError, LayerMap

transformers = pytest.importorskip("transformers", reason="architectures come from transformers")


TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 64,
}
MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_expand": 2}


class Case(NamedTuple):
    model_type: str
    stacks: dict[str, int]  # path of each stack, number of its blocks
    settings: Mapping[str, Any] = MappingProxyType({})  # beyond TEXT; None removes one


CAUSAL = [
    Case("apertus", {"model.layers": 3}),
    Case("arcee", {"model.layers": 3}),
    Case("bamba", {"model.layers": 3}, {**MAMBA2, "attn_layer_indices": [1]}),
    Case("bart", {"model.decoder.layers": 3}, {"decoder_layers": 3, "encoder_layers": 5, "d_model": 32}),
    Case("bert", {"bert.encoder.layer": 3}),
    Case("biogpt", {"biogpt.layers": 3}),
    Case("bitnet", {"model.layers": 3}),
    Case("bloom", {"transformer.h": 3}),
    Case("codegen", {"transformer.h": 3}),
    Case("cohere", {"model.layers": 3}),
    Case("cohere2", {"model.layers": 3}),
    Case("cpmant", {"cpmant.encoder.layers": 3}),
    Case("ctrl", {"transformer.h": 3}),
    Case("deepseek_v2", {"model.layers": 3}, {"n_routed_experts": 4}),
    Case("deepseek_v3", {"model.layers": 3}, {"n_routed_experts": 4, "n_group": 1}),
    Case("electra", {"electra.encoder.layer": 3}),
    Case("ernie4_5", {"model.layers": 3}),
    Case("ernie4_5_moe", {"model.layers": 3}, {"moe_num_experts": 4}),
    Case("exaone4", {"model.layers": 3}),
    Case("falcon", {"transformer.h": 3}, {"head_dim": None}),
    Case("falcon_h1", {"model.layers": 3}),
    Case("falcon_mamba", {"backbone.layers": 3}),
    Case("gemma", {"model.layers": 3}),
    Case("gemma2", {"model.layers": 3}),
    Case("gemma3_text", {"model.layers": 3}),
    # altup_projections and altup_unembed_projections are lists of linear maps beside the blocks
    Case("gemma3n_text", {"model.layers": 5}, {"num_hidden_layers": 5, "num_kv_shared_layers": 0}),
    Case("glm", {"model.layers": 3}),
    Case("glm4", {"model.layers": 3}),
    Case("glm4_moe", {"model.layers": 3}, {"n_routed_experts": 4}),
    Case("gpt2", {"transformer.h": 3}),
    Case("gpt_bigcode", {"transformer.h": 3}),
    Case(
        "gpt_neo",
        {"transformer.h": 4},
        {"num_hidden_layers": 4, "attention_types": [[["global", "local"], 2]]},
    ),
    Case("gpt_neox", {"gpt_neox.layers": 3}),
    Case("gpt_oss", {"model.layers": 3}, {"num_local_experts": 4}),
    Case("gptj", {"transformer.h": 3}),
    Case("granite", {"model.layers": 3}),
    Case("granitemoe", {"model.layers": 3}),
    Case("granitemoehybrid", {"model.layers": 3}, MAMBA2),
    Case("helium", {"model.layers": 3}),
    Case("hunyuan_v1_dense", {"model.layers": 3}),
    Case("hunyuan_v1_moe", {"model.layers": 3}),
    Case("internlm3", {"model.layers": 3}),
    # attention in one layer, experts in every other
    Case(
        "jamba", {"model.layers": 4}, {"num_hidden_layers": 4, "attn_layer_period": 4, "attn_layer_offset": 1}
    ),
    # two layers of different classes repeat nothing: the configuration alone vouches for them
    Case(
        "jamba", {"model.layers": 2}, {"num_hidden_layers": 2, "attn_layer_period": 2, "attn_layer_offset": 1}
    ),
    Case("jetmoe", {"model.layers": 3}),
    Case("lfm2", {"model.layers": 3}),
    Case("llama", {"model.layers": 3}),
    Case("llama", {"model.layers": 1}, {"num_hidden_layers": 1}),
    Case("llama4_text", {"model.layers": 3}, {"num_local_experts": 4}),
    Case("mamba", {"backbone.layers": 3}),
    Case("mamba2", {"backbone.layers": 3}, {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1}),
    Case("minimax", {"model.layers": 3}, {"num_local_experts": 4}),
    Case("mistral", {"model.layers": 3}),
    Case("mixtral", {"model.layers": 3}, {"num_local_experts": 8}),
    Case("modernbert-decoder", {"model.layers": 3}),
    Case("mpt", {"transformer.blocks": 3}),
    Case("nemotron", {"model.layers": 3}),
    Case("olmo", {"model.layers": 3}),
    Case("olmo2", {"model.layers": 3}),
    Case("olmo3", {"model.layers": 3}),
    Case("olmoe", {"model.layers": 3}, {"num_experts": 4}),
    Case("openai-gpt", {"transformer.h": 3}),
    Case("opt", {"model.decoder.layers": 3}, {"word_embed_proj_dim": 16}),
    Case("persimmon", {"model.layers": 3}),
    Case("phi", {"model.layers": 3}),
    Case("phi3", {"model.layers": 3}),
    Case("phimoe", {"model.layers": 3}, {"num_local_experts": 4}),
    Case("qwen2", {"model.layers": 3}),
    Case("qwen2_moe", {"model.layers": 3}, {"num_experts": 4}),
    Case("qwen3", {"model.layers": 3}),
    Case("qwen3_moe", {"model.layers": 3}, {"num_experts": 4}),
    Case("qwen3_next", {"model.layers": 4}, {"num_hidden_layers": 4, "num_experts": 4}),
    Case("recurrent_gemma", {"model.layers": 3}),
    Case("roberta", {"roberta.encoder.layer": 3}),
    Case("rwkv", {"rwkv.blocks": 3}),
    Case("seed_oss", {"model.layers": 3}),
    Case("smollm3", {"model.layers": 3}),
    Case("stablelm", {"model.layers": 3}),
    Case("starcoder2", {"model.layers": 3}),
    Case("trocr", {"model.decoder.layers": 3}, {"decoder_layers": 3}),
    Case("xglm", {"model.layers": 3}),
    Case("xlnet", {"transformer.layer": 3}, {"max_position_embeddings": None, "n_layer": 3, "d_head": 8}),
    Case("xlstm", {"backbone.blocks": 3}),
    # one transformer block is shared by several layers
    Case(
        "zamba", {"model.layers": 7}, {"num_hidden_layers": 7, "attn_layer_period": 3, "attn_layer_offset": 1}
    ),
    Case(
        "zamba2",
        {"model.layers": 6},
        {
            "num_hidden_layers": 6,
            "layer_types": ["mamba", "hybrid", "mamba", "hybrid", "mamba", "hybrid"],
            "num_mem_blocks": 1,
            "mamba_headdim": 8,
            "n_mamba_heads": 8,
            "head_dim": None,
        },
    ),
]

# Both stacks, the encoder first. Depths differ, so that neither can be taken for the other.
DEPTHS = {"encoder_layers": 2, "decoder_layers": 4, "d_model": 32, "vocab_size": 64}
T5_DEPTHS = {"num_layers": 2, "num_decoder_layers": 4, "d_model": 32, "d_kv": 8, "vocab_size": 64}
BART_LIKE = {"model.encoder.layers": 2, "model.decoder.layers": 4}
T5_LIKE = {"encoder.block": 2, "decoder.block": 4}
ENCODER_DECODER = [
    Case("bart", BART_LIKE, DEPTHS),
    Case("blenderbot", BART_LIKE, DEPTHS),
    Case("led", {"led.encoder.layers": 2, "led.decoder.layers": 4}, {**DEPTHS, "attention_window": 4}),
    Case("longt5", T5_LIKE, T5_DEPTHS),
    Case("m2m_100", BART_LIKE, DEPTHS),
    Case("marian", BART_LIKE, {**DEPTHS, "pad_token_id": 0, "decoder_start_token_id": 0}),
    Case("mbart", BART_LIKE, DEPTHS),
    Case("mt5", T5_LIKE, T5_DEPTHS),
    Case("nllb-moe", BART_LIKE, {**DEPTHS, "num_experts": 4}),
    Case("pegasus", BART_LIKE, DEPTHS),
    Case("switch_transformers", T5_LIKE, {**T5_DEPTHS, "num_experts": 4}),
    Case("t5", T5_LIKE, T5_DEPTHS),
    # the same depth on both sides
    Case(
        "t5",
        {"encoder.block": 3, "decoder.block": 3},
        {**T5_DEPTHS, "num_layers": 3, "num_decoder_layers": 3},
    ),
    Case(
        "t5gemma",
        {"model.encoder.layers": 2, "model.decoder.layers": 4},
        {"encoder": {**TEXT, "num_hidden_layers": 2}, "decoder": {**TEXT, "num_hidden_layers": 4}},
    ),
    Case("umt5", T5_LIKE, T5_DEPTHS),
]
HEADS = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
SPEECH = [
    Case("speech_to_text", BART_LIKE, {**DEPTHS, **HEADS}),
    Case("whisper", BART_LIKE, {**DEPTHS, **HEADS, "pad_token_id": 0}),
]

# The tower has more blocks than the language model, and wider ones.
TOWER = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
QWEN_TOWER = {"depth": 7, "hidden_size": 128, "embed_dim": 128, "intermediate_size": 512, "num_heads": 4}
IN_MODEL = {"model.language_model.layers": 3}
IN_TEXT = {"model.text_model.layers": 3}
LLAMA = {**TEXT, "model_type": "llama"}
QWEN2 = {**TEXT, "model_type": "qwen2"}
GEMMA = {**TEXT, "model_type": "gemma"}
OPT = {**TEXT, "model_type": "opt", "word_embed_proj_dim": 32}
CLIP = {**TOWER, "model_type": "clip_vision_model"}
SIGLIP = {**TOWER, "model_type": "siglip_vision_model"}


def multimodal(model_type: str, stacks: dict[str, int], text: dict, vision: dict, **more: Any) -> Case:
    return Case(model_type, stacks, {"text_config": text, "vision_config": vision, **more})


MULTIMODAL = [
    multimodal("aria", IN_MODEL, {**TEXT, "moe_num_experts": 4}, {**TOWER, "model_type": "idefics3_vision"}),
    multimodal("blip-2", {"language_model.model.decoder.layers": 3}, OPT, TOWER),
    multimodal("gemma3", IN_MODEL, {**TEXT, "sliding_window": 16}, SIGLIP),
    multimodal("idefics2", IN_TEXT, {**TEXT, "model_type": "mistral"}, TOWER),
    multimodal("idefics3", IN_TEXT, LLAMA, TOWER),
    multimodal("instructblip", {"language_model.model.decoder.layers": 3}, OPT, TOWER),
    multimodal("internvl", IN_MODEL, QWEN2, {**TOWER, "image_size": [32, 32], "patch_size": [8, 8]}),
    multimodal("kosmos-2", {"text_model.model.layers": 3}, {"layers": 3, "vocab_size": 64}, TOWER),
    multimodal("llama4", {"language_model.model.layers": 3}, TEXT, TOWER),
    multimodal("llava", IN_MODEL, LLAMA, CLIP),
    # as many blocks in the tower as in the language model: the count says nothing
    multimodal("llava", IN_MODEL, LLAMA, {**CLIP, "num_hidden_layers": 3}),
    # one block, beside a tower of many
    multimodal("llava", {"model.language_model.layers": 1}, {**LLAMA, "num_hidden_layers": 1}, CLIP),
    multimodal("llava_next", IN_MODEL, LLAMA, CLIP, image_grid_pinpoints=[[32, 32]]),
    multimodal("llava_onevision", IN_MODEL, QWEN2, SIGLIP),
    multimodal("mistral3", IN_MODEL, {**TEXT, "model_type": "mistral"}, {**TOWER, "model_type": "pixtral"}),
    # cross-attention blocks among the language model's, two stacks in the tower
    multimodal(
        "mllama",
        {"model.language_model.layers": 4},
        {**TEXT, "num_hidden_layers": 4, "cross_attention_layers": [1]},
        {**TOWER, "num_global_layers": 5, "vision_output_dim": 256, "intermediate_layers_indices": [2]},
    ),
    multimodal("paligemma", IN_MODEL, GEMMA, SIGLIP),
    multimodal("qwen2_vl", IN_MODEL, TEXT, QWEN_TOWER),
    multimodal("qwen2_5_vl", IN_MODEL, TEXT, QWEN_TOWER),
    multimodal("qwen3_vl", IN_MODEL, TEXT, QWEN_TOWER),
    multimodal("smolvlm", IN_TEXT, LLAMA, TOWER),
    multimodal("video_llava", IN_MODEL, LLAMA, CLIP),
    multimodal("vipllava", IN_MODEL, LLAMA, CLIP, vision_feature_layers=[-1]),
    Case("fuyu", IN_MODEL, {"text_config": {**TEXT, "model_type": "persimmon"}}),
    # tower inside the module that holds the word embedding
    Case("git", {"git.encoder.layer": 3}, {**TEXT, "vision_config": TOWER}),
    Case("git", {"git.encoder.layer": 7}, {**TEXT, "num_hidden_layers": 7, "vision_config": TOWER}),
    # gated cross-attention in a second list beside the blocks
    Case("idefics", {"model.layers": 4}, {**TEXT, "num_hidden_layers": 4, "cross_layer_interval": 2}),
    # a tower in front of an encoder-decoder
    Case("florence2", {"model.language_model.encoder.layers": 2, "model.language_model.decoder.layers": 4}, {
        "text_config": {**DEPTHS, "model_type": "bart"},
    }),
    # an image encoder in front of a decoder
    Case("vision-encoder-decoder", {"decoder.transformer.h": 3}, {
        "encoder": {**TOWER, "model_type": "vit"},
        "decoder": {**TEXT, "model_type": "gpt2", "add_cross_attention": True, "is_decoder": True},
    }),
    Case("qwen2_audio", IN_MODEL, {
        "text_config": QWEN2,
        "audio_config": {"encoder_layers": 7, "d_model": 128, "encoder_attention_heads": 4},
    }),
    Case("voxtral", IN_MODEL, {"text_config": LLAMA, "audio_config": {"num_hidden_layers": 7}}),
]  # fmt: skip


def build(case: Case, auto: Any, base: dict[str, Any]) -> nn.Module:
    settings = {key: value for key, value in {**base, **case.settings}.items() if value is not None}
    config = transformers.AutoConfig.for_model(case.model_type, **settings)
    with torch.device("meta"):
        return auto.from_config(config)


def check(model: nn.Module, expected: dict[str, int]) -> LayerMap:
    """The expected blocks, and the ownership of every parameter computed anew from the blocks by identity."""
    trainable = [parameter.requires_grad for parameter in model.parameters()]
    layers = LayerMap.from_model(model)
    blocks = [f"{stack}.{index}" for stack, length in expected.items() for index in range(length)]
    assert list(layers.names) == blocks

    inside = [{id(p) for p in model.get_submodule(block).parameters()} for block in blocks]
    beyond = {
        id(parameter)
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if not any(name.startswith(block + ".") for block in blocks)
    }
    sizes, outside = [0] * len(blocks), 0
    assigned = layers.assign(model)
    assert [(name, id(p)) for name, p, _ in assigned] == [
        (name, id(p)) for name, p in model.named_parameters()
    ]
    for name, parameter, layer in assigned:
        users = [index for index, ids in enumerate(inside) if id(parameter) in ids]
        owner = users[0] if len(users) == 1 and id(parameter) not in beyond else None
        assert layer == owner, name
        assert layers.layer_of(name) == owner, name
        if owner is None:
            outside += parameter.numel()
        else:
            sizes[owner] += parameter.numel()
    assert list(layers.num_params) == sizes
    assert layers.outside_num_params == outside
    assert sum(sizes) + outside == sum(p.numel() for p in model.parameters())
    assert all(sizes)
    assert [parameter.requires_grad for parameter in model.parameters()] == trainable
    return layers


def case_id(case: Case) -> str:
    return f"{case.model_type}-{'+'.join(map(str, case.stacks.values()))}"


@pytest.mark.parametrize("case", CAUSAL, ids=case_id)
def test_causal_language_model(case):
    check(build(case, transformers.AutoModelForCausalLM, TEXT), case.stacks)


@pytest.mark.parametrize("case", ENCODER_DECODER, ids=case_id)
def test_encoder_decoder_gives_both_stacks(case):
    check(build(case, transformers.AutoModelForSeq2SeqLM, {}), case.stacks)


@pytest.mark.parametrize("case", SPEECH, ids=case_id)
def test_speech_encoder_decoder_gives_both_stacks(case):
    check(build(case, transformers.AutoModelForSpeechSeq2Seq, {}), case.stacks)


@pytest.mark.parametrize("case", MULTIMODAL, ids=case_id)
def test_multimodal_model_gives_the_language_models_blocks(case):
    speech = "audio_config" in case.settings
    auto = transformers.AutoModelForSeq2SeqLM if speech else transformers.AutoModelForImageTextToText
    check(build(case, auto, {}), case.stacks)


@pytest.mark.parametrize(("model_type", "text"), [("llava", LLAMA), ("gemma3", TEXT), ("qwen2_5_vl", TEXT)])
def test_the_tower_that_is_passed_over_is_deeper_and_larger(model_type, text):
    vision = QWEN_TOWER if model_type == "qwen2_5_vl" else CLIP if model_type == "llava" else SIGLIP
    model = build(
        multimodal(model_type, IN_MODEL, text, vision), transformers.AutoModelForImageTextToText, {}
    )
    layers = check(model, IN_MODEL)
    tower = [p for name, p in model.named_parameters() if ".visual." in name or ".vision_tower." in name]
    assert sum(p.numel() for p in tower) > 2 * sum(layers.num_params)
    assert {name for name, p in model.named_parameters() if any(p is other for other in tower)} <= set(
        layers.outside
    )


def test_block_shared_by_hybrid_layers_belongs_to_none_of_them():
    case = next(case for case in CAUSAL if case.model_type == "zamba2")
    layers = check(build(case, transformers.AutoModelForCausalLM, TEXT), case.stacks)
    assert any("shared_transformer" in name for name in layers.outside)
    assert not any("shared_transformer" in name for names in layers.parameter_names for name in names)


def test_parallel_lists_of_half_blocks_are_doubt():
    case = Case("xlm", {}, {"emb_dim": 32, "n_layers": 3, "n_heads": 4, "n_words": 64})
    model = build(case, transformers.AutoModelForCausalLM, {})
    with pytest.raises(LayerDiscoveryError) as caught:
        LayerMap.from_model(model)
    assert "transformer.attentions.*" in str(caught.value)
    assert "transformer.ffns.*" in str(caught.value)


def test_cross_attention_list_of_the_same_length_is_doubt_that_a_pattern_ends():
    case = Case("idefics", {}, {**TEXT, "num_hidden_layers": 2, "cross_layer_interval": 1})
    model = build(case, transformers.AutoModelForImageTextToText, {})
    with pytest.raises(LayerDiscoveryError, match=r"model\.gated_cross_attn_layers\.\*"):
        LayerMap.from_model(model)
    assert LayerMap.from_model(model, "model.layers.*").names == ("model.layers.0", "model.layers.1")


def test_encoder_of_shared_layers_has_no_stack():
    model = build(Case("albert", {}, TEXT), transformers.AutoModelForMaskedLM, {})
    with pytest.raises(LayerDiscoveryError, match="no repeated blocks"):
        LayerMap.from_model(model)


def test_pruned_language_model_beside_a_tower():
    case = multimodal("llava", IN_MODEL, {**LLAMA, "num_hidden_layers": 5}, CLIP)
    model = build(case, transformers.AutoModelForImageTextToText, {})
    model.model.language_model.layers = model.model.language_model.layers[:3]
    check(model, IN_MODEL)


def test_pruned_model_whose_blocks_lie_deeper_than_the_embedding():
    model = build(Case("bert", {}, {"num_hidden_layers": 5}), transformers.AutoModelForCausalLM, TEXT)
    model.bert.encoder.layer = model.bert.encoder.layer[:3]
    check(model, {"bert.encoder.layer": 3})


def test_two_towers_without_a_language_model_are_doubt():
    config = transformers.CLIPConfig(text_config=TEXT, vision_config=TOWER)
    with torch.device("meta"):
        model = transformers.CLIPModel(config)
    with pytest.raises(LayerDiscoveryError, match=r"(?s)text_model\.encoder.*vision_model\.encoder"):
        LayerMap.from_model(model)
