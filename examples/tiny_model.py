"""A Llama of five small random layers and a tokenizer of digits, in place of yours: nothing is downloaded."""

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SYMBOLS = ["<pad>", "<eos>", "<unk>", *"0123456789+= "]


def make_model() -> LlamaForCausalLM:
    """Return the model, the same in every run."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(SYMBOLS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=5,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with a token for each character."""
    tokenizer = Tokenizer(models.WordLevel({s: i for i, s in enumerate(SYMBOLS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
    )


def make_sums(count: int) -> list[tuple[str, str]]:
    """Return questions and answers, such as ("3+4=", "7")."""
    return [(f"{i % 10}+{i * 7 % 10}=", str(i % 10 + i * 7 % 10)) for i in range(count)]
