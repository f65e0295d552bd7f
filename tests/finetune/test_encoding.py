"""From records to token ids and labels.

Would catch: a loss on the prompt, on padding or on the user's turns; a response without its end token; a
cut that is not counted, or an example of which nothing is left to learn; a prompt for generation that
differs from the prompt in training, or from what the saved template produces; tools and calls that the model never
sees; the rest of a long text lost; packed texts that see each other.
"""

import json
from dataclasses import replace
from typing import get_args

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomForCausalLM,
    FalconForCausalLM,
    MambaForCausalLM,
    OPTForCausalLM,
)
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from grass import ConfigError, DataError
from grass.finetune import encoding
from grass.finetune.demo import demo_tokenizer
from grass.finetune.encoding import IGNORED, TEMPLATES, Collator, Example, check_packing, pack, to_dataset
from grass.finetune.loss import chunked_loss
from grass.finetune.options import Template
from grass.finetune.records import PlainText, parse_record

CHAT_TEMPLATE = (
    "{% for m in messages %}<s> {{ m.role }} {{ m.content }} </s>{% endfor %}"
    "{% if add_generation_prompt %}<s> assistant {% endif %}"
)
TOOL_TEMPLATE = (
    "{% for t in tools or [] %}<s> system {{ t.function.name }} </s>{% endfor %}"
    "{% for m in messages %}<s> {{ m.role }} {{ m.content }}"
    "{% for c in m.tool_calls or [] %} {{ c.function.name }} {{ c.function.arguments.a }}{% endfor %} </s>{% endfor %}"
    "{% if add_generation_prompt %}<s> assistant {% endif %}"
)


def record(**item):
    return parse_record(item, evaluation=True)[0]


class Encoder(encoding.Encoder):
    def one(self, record):
        """The only example of a record."""
        (example,) = self.encode_one(record)
        return example


def chat(*turns, **more):
    messages = [{"role": role, "content": content} for role, content in turns]
    return record(messages=messages, **more)


CHAT = chat(("user", "Ada has 3"), ("assistant", "3 + 4"), ("user", "in all"), ("assistant", "= 7"))


@pytest.fixture
def chat_tokenizer():
    tokenizer = demo_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def learnt(tokenizer, example):
    return tokenizer.decode([label for label in example.labels if label != IGNORED])


@pytest.mark.parametrize("template", TEMPLATES)
def test_only_the_response_is_learnt_and_it_ends(tokenizer, template):
    encoder = Encoder(tokenizer, template, 64)
    task = record(instruction="Ada has 3 apples.", input="There are 4 more.", output="3 + 4 = 7", answer="7")
    example = encoder.one(task)
    assert learnt(tokenizer, example) == "3 + 4 = 7 </s>"
    prompt = encoder.prompt(task)
    assert example.input_ids[: len(prompt)] == prompt
    assert example.labels[: len(prompt)] == [IGNORED] * len(prompt)
    assert prompt[0] == tokenizer.bos_token_id
    assert prompt.count(tokenizer.bos_token_id) == 1


def alpaca(task, given=""):
    paired = ", paired with an input that provides further context" if given else ""
    section = f"### Input:\n{given}\n\n" if given else ""
    return (
        f"Below is an instruction that describes a task{paired}. Write a response that appropriately completes the "
        f"request.\n\n### Instruction:\n{task}\n\n{section}### Response:\n"
    )


@pytest.mark.parametrize("given", ["", " some\n\nwords "])
def test_the_templates_write_what_llm_adapters_writes(tokenizer, given):
    task = record(instruction="  do it\n", input=given, output="so\n")
    written = {name: Encoder(tokenizer, name, 64)._render(task, 2).removeprefix("<s>") for name in TEMPLATES}
    assert written["alpaca"] == alpaca("  do it\n", given) + "so\n</s>"
    assert written["plain"] == "  do it\n\n" + (f"{given}\n" if given else "") + "so\n</s>"


def test_the_models_own_template_is_used_if_it_has_one(tokenizer, chat_tokenizer):
    assert Encoder(chat_tokenizer, "auto", 64).chat_template == CHAT_TEMPLATE
    assert Encoder(tokenizer, "auto", 64).chat_template == Encoder(tokenizer, "alpaca", 64).chat_template
    assert Encoder(chat_tokenizer, "plain", 64).chat_template != CHAT_TEMPLATE
    with pytest.raises(ConfigError, match="no chat template: pass --template alpaca or plain"):
        Encoder(tokenizer, "chat", 64)


@pytest.mark.parametrize("template", get_args(Template))
def test_a_saved_template_asks_as_the_model_was_trained(chat_tokenizer, tmp_path, template):
    encoder = Encoder(chat_tokenizer, template, 64)
    chat_tokenizer.chat_template = encoder.chat_template
    chat_tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    messages = [message.as_dict() for message in CHAT.messages]
    said = loaded.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
    assert said == encoder.prompt(CHAT)
    assert encoder.one(CHAT).input_ids[: len(said)] == said


def test_plain_text_is_learnt_as_a_whole(tokenizer):
    example = Encoder(tokenizer, "plain", 64).one(PlainText("3 + 4 = 7"))
    assert example.labels == example.input_ids
    assert tokenizer.decode(example.input_ids) == "<s> 3 + 4 = 7 </s>"


@pytest.mark.parametrize("template", get_args(Template))
def test_chat_learns_the_assistants_turns_only(chat_tokenizer, template):
    example = Encoder(chat_tokenizer, template, 512).one(CHAT)
    assert learnt(chat_tokenizer, example) == "3 + 4 </s> = 7 </s>"
    labelled = [(i, label) for i, label in zip(*example, strict=True) if label != IGNORED]
    assert all(i == label for i, label in labelled)


@pytest.mark.parametrize("template", get_args(Template))
def test_a_chat_prompt_is_the_beginning_of_the_chat(chat_tokenizer, template):
    encoder = Encoder(chat_tokenizer, template, 512)
    example, prompt = encoder.one(CHAT), encoder.prompt(CHAT)
    assert example.input_ids[: len(prompt)] == prompt
    assert example.labels[len(prompt)] != IGNORED
    assert example.labels[len(prompt) - 1] == IGNORED


@pytest.mark.parametrize("weights", [(1, 1), (1, 0), (0, 1)])
def test_replies_that_a_template_rewrites_later_are_learnt_one_by_one(weights):
    """As reasoning models do, which leave the thoughts of earlier turns out."""
    forgetful = demo_tokenizer()
    forgetful.chat_template = (
        "{% for m in messages %}<s> {{ m.role }} "
        "{% if m.role != 'assistant' or loop.last %}{{ m.content }} {% endif %}</s>{% endfor %}"
        "{% if add_generation_prompt %}<s> assistant {% endif %}"
    )
    messages = [message.as_dict() for message in CHAT.messages]
    messages[1]["weight"], messages[3]["weight"] = weights
    encoder, replies = Encoder(forgetful, "chat", 64), ["3 + 4 </s>", "= 7 </s>"]
    item = record(messages=messages)
    examples = encoder.encode_one(item)
    assert [learnt(forgetful, e) for e in examples] == [r for r, w in zip(replies, weights, strict=True) if w]
    if weights == (1, 1):
        assert encoder.encode([item], "d").num_unrolled == 1
        prompts = [encoder.prompt(record(messages=messages[:2])), encoder.prompt(item)]
        assert all(e.input_ids[: len(p)] == p for e, p in zip(examples, prompts, strict=True))


def test_the_token_that_ends_a_reply_is_found(tokenizer, chat_tokenizer):
    assert Encoder(tokenizer, "alpaca", 64).end_of_reply() == tokenizer.eos_token_id
    chat_tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    chat_tokenizer.chat_template = CHAT_TEMPLATE.replace("{{ m.content }} </s>", "{{ m.content }}<|end|>\n")
    end = Encoder(chat_tokenizer, "auto", 64).end_of_reply()
    assert chat_tokenizer.convert_ids_to_tokens(end) == "<|end|>"
    chat_tokenizer.chat_template = CHAT_TEMPLATE.replace("{{ m.content }} </s>", "{{ m.content }} now ")
    assert Encoder(chat_tokenizer, "auto", 64).end_of_reply() is None


@pytest.mark.parametrize("role", ["system", "tool"])
def test_a_template_that_leaves_a_role_out_is_an_error(role):
    deaf = demo_tokenizer()
    deaf.chat_template = CHAT_TEMPLATE.replace(
        "<s> {{ m.role }}", "{% if m.role in ('user', 'assistant') %}<s>"
    )
    deaf.chat_template = deaf.chat_template.replace("</s>{% endfor %}", "</s>{% endif %}{% endfor %}")
    turns = [("user", "3 + 4"), ("assistant", "= 7")]
    Encoder(deaf, "auto", 64).encode([chat(*turns)], "d")
    with pytest.raises(DataError, match=f"d: the chat template leaves the {role}'s message out"):
        Encoder(deaf, "auto", 64).encode([chat((role, "How many"), *turns)], "d")


def test_cut_and_dropped_texts_are_counted(tokenizer):
    records = [
        record(instruction="1 + 1", output="= 2"),  # <s> 1 + 1 = 2 </s>
        record(instruction="1 + 1", output="= 2 1 + 1 = 2"),  # cut
        record(
            instruction="How many apples did Ada find in the box now", output="3"
        ),  # prompt fills it: dropped
    ]
    encoded = Encoder(tokenizer, "plain", 8).encode(records, "d.jsonl")
    assert (len(encoded.examples), encoded.num_cut, encoded.num_dropped) == (2, 2, 1)
    assert [len(e.input_ids) for e in encoded.examples] == [7, 8]
    with pytest.raises(DataError, match=r"d\.jsonl: 1 of 1 texts have no token to learn"):
        Encoder(tokenizer, "plain", 8).encode(records[2:], "d.jsonl")


@pytest.mark.parametrize("context", [2, 5, 11, 12, 13])
def test_a_long_text_is_divided_and_nothing_is_lost(tokenizer, context):
    encoder, text = Encoder(tokenizer, "plain", context), PlainText("1 + 1 = 2 1 + 1 = 2")  # 12 tokens
    encoded = encoder.encode([text], "d")
    assert all(len(e.input_ids) <= context and e.labels == e.input_ids for e in encoded.examples)
    together = [token for example in encoded.examples for token in example.input_ids]
    whole = encoder.one(text).input_ids
    assert together == whole or (
        together == whole[:-1] and len(whole) % context == 1
    )  # nothing predicts a lone one
    assert encoded.num_divided == (context < 12)
    assert encoded.num_cut == encoded.num_dropped == 0


def test_a_prompt_that_leaves_room_for_one_token_is_kept(tokenizer):
    task = record(instruction="1 + 1", output="2")  # <s> 1 + 1 | 2 </s>
    kept = Encoder(tokenizer, "plain", 5).encode([task], "d").examples[0]
    assert kept == Example([1, *tokenizer("1 + 1 2", add_special_tokens=False)["input_ids"]], kept.labels)
    assert kept.labels[:4] == [IGNORED] * 4
    assert kept.labels[4] == kept.input_ids[4]


def test_a_tokenizer_without_an_end_is_refused():
    endless = demo_tokenizer()
    endless.eos_token = None
    with pytest.raises(ConfigError, match="no end-of-sequence token"):
        Encoder(endless, "plain", 64)


def test_a_collator_counts_tokens_without_padding():
    collate = Collator(DataCollatorForLanguageModeling(pad_token_id=9))
    rows = [Example([1, 2, 3], [IGNORED, 2, 3])._asdict(), Example([4], [4])._asdict()]
    batch = collate(rows)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 2, 3], [4, IGNORED, IGNORED]]
    collate(rows[1:])
    assert collate.num_tokens == 5


def test_packed_texts_have_the_loss_of_single_ones(tiny_model):
    """Would catch: texts of a row that see each other, or positions that go on from one to the next."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model).double()
    texts = [[1, 9, 8, 7, 2], [1, 30, 31, 2], [1, 12, 13, 14, 15, 16, 2], [1, 40, 2]]
    packed = pack(to_dataset([Example(ids, [IGNORED, *ids[1:]]) for ids in texts]), 12)
    assert len(packed) == 2
    batch = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)(list(packed))
    alone = [
        model(input_ids=torch.tensor([ids]), labels=torch.tensor([ids])).loss * (len(ids) - 1)
        for ids in texts
    ]
    expected = sum(alone) / sum(len(ids) - 1 for ids in texts)
    torch.testing.assert_close(chunked_loss(model, batch).float(), expected)
    torch.testing.assert_close(model(**batch, use_cache=False).loss, expected)
    assert model(**batch).loss != expected  # with a cache texts see each other: Trainer must turn it off


@pytest.mark.parametrize("make", [OPTForCausalLM, MambaForCausalLM, FalconForCausalLM, BloomForCausalLM])
def test_models_that_do_not_separate_texts_are_not_packed(make, tiny_model):
    check_packing(AutoModelForCausalLM.from_pretrained(tiny_model))
    check_packing(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16))
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50}
    more = {"ffn_dim": 16, "word_embed_proj_dim": 16} if make is OPTForCausalLM else {}
    more = {"alibi": True} if make is FalconForCausalLM else more
    with pytest.raises(ConfigError, match="leave out --packing"):
        check_packing(make(make.config_class(**sizes, **more)))


@pytest.mark.parametrize("template", get_args(Template))
def test_messages_of_weight_zero_are_read_and_not_learnt(chat_tokenizer, template):
    messages = [message.as_dict() for message in CHAT.messages]
    messages[1]["weight"] = 0
    encoder = Encoder(chat_tokenizer, template, 512)
    example = encoder.one(record(messages=messages))
    assert example.input_ids == encoder.one(CHAT).input_ids
    assert learnt(chat_tokenizer, example) == "= 7 </s>"


@pytest.mark.parametrize("templated", [True, False])
@pytest.mark.parametrize("system", [(), (("system", "Ada has"),)])
def test_only_the_reply_is_learnt_if_the_assistant_speaks_first(templated, system):
    """The template adds a system prompt of its own, as those of SmolLM2 and Qwen2 do."""
    used = demo_tokenizer()
    if templated:
        used.chat_template = (
            "{% for m in messages %}"
            "{% if loop.first and m.role != 'system' %}<s> system How many </s>{% endif %}"
            "<s> {{ m.role }} {{ m.content }} </s>{% endfor %}"
            "{% if add_generation_prompt %}<s> assistant {% endif %}"
        )
    first = chat(*system, ("assistant", "3 + 4"), ("user", "in all"), ("assistant", "= 7"))
    assert learnt(used, Encoder(used, "auto", 512).one(first)) == "3 + 4 </s> = 7 </s>"


@pytest.mark.parametrize("template", TEMPLATES)
def test_system_and_history_are_part_of_the_prompt(tokenizer, template):
    encoder = Encoder(tokenizer, template, 512)
    task = {"instruction": "How many now", "output": "7", "input": "4 more"}
    alone = record(**task)
    whole = record(**task, system="Ada has", history=[["3 + 0", "3"], ["4 + 0", "4"]])
    example, prompt = encoder.one(whole), encoder.prompt(whole)
    assert learnt(tokenizer, example) == "7 </s>"
    assert example.input_ids[: len(prompt)] == prompt
    assert prompt.count(tokenizer.bos_token_id) == 1
    assert prompt[-len(encoder.prompt(alone)) + 1 :] == encoder.prompt(alone)[1:]
    assert prompt.count(tokenizer.eos_token_id) == 2  # each earlier reply ends
    assert tokenizer.decode(prompt).startswith("<s> Ada has")
    for words in ("3 + 0", "3 </s>", "4 + 0", "4 </s>"):
        assert words in tokenizer.decode(prompt)


CALL = {"type": "function", "function": {"name": "many", "arguments": {"a": "40"}}}
TOOLS = [{"type": "function", "function": {"name": "find"}}]
CALLING = [
    {"role": "user", "content": "3 + 4"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "7", "name": "many"},
    {"role": "assistant", "content": "= 7"},
]


@pytest.mark.parametrize("as_text", [False, True])
def test_tools_are_seen_and_their_calls_are_learnt(as_text):
    """Columns of one type, as in parquet, hold tools as text."""
    used = demo_tokenizer()
    used.chat_template = TOOL_TEMPLATE
    item = record(messages=CALLING, tools=json.dumps(TOOLS) if as_text else TOOLS)
    example = Encoder(used, "auto", 64).one(item)
    assert used.decode(example.input_ids).startswith("<s> <unk> find </s> <s> <unk> 3 + 4 </s>")
    assert learnt(used, example) == "many 40 </s> = 7 </s>"


@pytest.mark.parametrize(
    ("item", "says"),
    [
        ({"messages": CALLING}, "calls of tools out"),
        ({"messages": [CALLING[0], CALLING[3]], "tools": TOOLS}, "tools out"),
    ],
)
def test_a_template_that_leaves_tools_out_is_an_error(chat_tokenizer, item, says):
    with pytest.raises(DataError, match=rf"d: the chat template leaves {says}"):
        Encoder(chat_tokenizer, "auto", 64).encode([record(**item)], "d")
    if "calls" in says:
        with pytest.raises(DataError, match="calls of tools need a chat template of the model"):
            Encoder(chat_tokenizer, "alpaca", 64).one(record(**item))


def test_a_template_that_refuses_a_turn_is_named_with_the_record():
    strict = demo_tokenizer()
    strict.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    turns = [("user", "1 + 1"), ("assistant", "2")]
    refused = replace(chat(("system", "Be brief."), *turns), place="data.jsonl:7")
    chats = [chat(*turns), refused]
    says = r"data\.jsonl:7: the chat template refuses .* system, user.*: System role not supported; "
    with pytest.raises(DataError, match=says):
        Encoder(strict, "auto", 32).encode(chats, "data")
