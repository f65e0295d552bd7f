"""Loading of the model of a run.

Would catch: weights that the files lack and that are initialized at random; a complete model refused because its
weights are tied; a model trained although it sees the tokens that it predicts; a pointer or a half of a file that
ends in a traceback.
"""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from grass.errors import ConfigError, ModelError
from grass.finetune.model import load_model
from grass.finetune.screen import quiet_libraries

LLAMA = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
BERT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 538090408\n"


@pytest.fixture(autouse=True)
def quiet():
    with quiet_libraries():
        yield


@pytest.fixture
def save(tmp_path, tokenizer):
    """Save a model with a tokenizer, and return the folder."""

    def saved(model, **options):
        model.save_pretrained(tmp_path / "model", **options)
        tokenizer.save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    return saved


def llama(tokenizer, **options):
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **LLAMA, **options))


def remove(folder, *names):
    file = folder / "model.safetensors"
    weights = {name: w for name, w in load_file(file).items() if not any(part in name for part in names)}
    save_file(weights, file, metadata={"format": "pt"})


@pytest.mark.parametrize("tied", [True, False])
def test_complete_models_load(save, tokenizer, tied):
    folder = save(llama(tokenizer, tie_word_embeddings=tied))
    assert ("lm_head.weight" in load_file(folder / "model.safetensors")) != tied
    model, _ = load_model(str(folder), say=pytest.fail)
    saved = load_file(folder / "model.safetensors")
    assert all(torch.equal(model.state_dict()[name], weight) for name, weight in saved.items())


@pytest.mark.parametrize(
    "model",
    [
        GPT2LMHeadModel(
            GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=9)
        ),  # with buffers, saved or not
        GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=9, **BERT)),  # its configuration says is_decoder: false
        BertLMHeadModel(BertConfig(vocab_size=9, is_decoder=True, **BERT)),
    ],
    ids=lambda model: type(model).__name__,
)
def test_causal_models_of_other_families_load(save, model):
    load_model(str(save(model)), say=pytest.fail)


def test_weights_that_are_not_used_are_told(save, tokenizer):
    folder, told = save(llama(tokenizer)), []
    file = folder / "model.safetensors"
    save_file({**load_file(file), "classifier.weight": torch.ones(2)}, file, metadata={"format": "pt"})
    load_model(str(folder), say=told.append)
    (line,) = told
    assert line.endswith("it has no place for 1 parameter of its files: classifier.weight")


def test_buffers_may_be_missing(save, tokenizer, monkeypatch):
    original = AutoModelForCausalLM.from_pretrained

    def from_pretrained(name, **options):
        model, info = original(name, **options)
        model.register_buffer("positions", torch.arange(4))
        return model, {**info, "missing_keys": {"positions"}}

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    load_model(str(save(llama(tokenizer))))


def test_missing_weights_are_refused_by_name(save, tokenizer):
    folder = save(llama(tokenizer))
    remove(folder, ".layers.1.", ".norm.weight")
    says = r"weights of 10 parameters are missing: model\.layers\.1\.input_layernorm\.weight, .* and 7 more.*again"
    with pytest.raises(ModelError, match=says):
        load_model(str(folder))


def test_an_untied_head_that_is_missing_is_refused(save, tokenizer):
    folder = save(llama(tokenizer))
    remove(folder, "lm_head")
    with pytest.raises(ModelError, match=r"weights of 1 parameter are missing: lm_head\.weight"):
        load_model(str(folder))


def test_weights_of_another_shape_are_refused_by_name(save, tokenizer):
    folder = save(llama(tokenizer))
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = torch.ones(7)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    says = r"1 parameter .* another shape: model\.norm\.weight \(7 in the file, 16 by config\.json\)"
    with pytest.raises(ModelError, match=says):
        load_model(str(folder))


def test_weights_missing_from_a_shard_or_with_the_shard(save, tokenizer):
    folder = save(llama(tokenizer), max_shard_size="5KB")
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    shard = folder / content["weight_map"].pop("model.layers.2.mlp.up_proj.weight")
    weights = load_file(shard)
    del weights["model.layers.2.mlp.up_proj.weight"]
    save_file(weights, shard, metadata={"format": "pt"})
    index.write_text(json.dumps(content))
    with pytest.raises(ModelError, match=r"missing: model\.layers\.2\.mlp\.up_proj\.weight"):
        load_model(str(folder))
    shard.unlink()
    with pytest.raises(ModelError, match="cannot load its weights"):
        load_model(str(folder))


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (lambda n: BertForMaskedLM(BertConfig(vocab_size=n, **BERT)), "saved as BertForMaskedLM"),
        (lambda n: BertLMHeadModel(BertConfig(vocab_size=n, **BERT)), "sees the tokens after"),
        (
            lambda n: LlamaForSequenceClassification(LlamaConfig(vocab_size=n, pad_token_id=0, **LLAMA)),
            "saved as LlamaForSequenceClassification",
        ),
        (
            lambda n: BartForConditionalGeneration(
                BartConfig(vocab_size=n, d_model=8, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=8,
                           decoder_ffn_dim=8, encoder_attention_heads=2, decoder_attention_heads=2)
            ),
            "saved as BartForConditionalGeneration",
        ),
    ],
    ids=["masked", "no decoder", "classifier", "encoder-decoder"],
)  # fmt: skip
def test_models_that_are_not_causal_are_refused(save, tokenizer, model, says):
    with pytest.raises(ModelError, match=rf"{says}.*not a causal language model.*pass"):
        load_model(str(save(model(len(tokenizer)))))


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json"])
def test_pointers_are_named(save, tokenizer, file):
    folder = save(llama(tokenizer))
    (folder / file).write_bytes(POINTER)
    with pytest.raises(ModelError, match=rf"{file} is a pointer of Git LFS.*git lfs pull"):
        load_model(str(folder))


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: bytes(100)])
def test_damaged_files_are_one_line(save, tokenizer, file, damage):
    folder = save(llama(tokenizer))
    (folder / file).write_bytes(damage((folder / file).read_bytes()))
    part = "weights" if "model" in file else "tokenizer"
    with pytest.raises(ModelError, match=rf"cannot load its {part}: .*again") as caught:
        load_model(str(folder))
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is not None  # shown by --debug


def test_a_damaged_configuration_is_one_line(save, tokenizer):
    folder = save(llama(tokenizer))
    (folder / "config.json").write_text('{"model_type": "llama", "hidden_size": "wide"}')
    with pytest.raises(ModelError, match=r"cannot load its configuration: .*again"):
        load_model(str(folder))
    with pytest.raises(ConfigError, match="no such folder"):
        load_model(str(folder / "none"))
