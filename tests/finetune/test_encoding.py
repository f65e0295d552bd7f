"""From records to token ids and labels.

Would catch: a loss on the prompt, on padding or on the user's turns; a response without its end token; a
cut that is not counted, or an example of which nothing is left to learn; a prompt for generation that
differs from the prompt in training; padding on the wrong side; a template that options accept and nothing encodes.
"""

from typing import get_args

import pytest

from grass import ConfigError, DataError
from grass.finetune.demo import demo_tokenizer
from grass.finetune.encoding import IGNORED, TEMPLATES, Collator, Encoder, Example, alpaca_prompt
from grass.finetune.options import Template
from grass.finetune.records import Chat, Instruction, PlainText

CHAT = Chat((("user", "Ada has 3"), ("assistant", "3 + 4"), ("user", "in all"), ("assistant", "= 7")))
CHAT_TEMPLATE = (
    "{% for m in messages %}<s> {{ m.role }} {{ m.content }} </s>{% endfor %}"
    "{% if add_generation_prompt %}<s> assistant {% endif %}"
)


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
    record = Instruction("Ada has 3 apples.", "3 + 4 = 7", "There are 4 more.", "7")
    example = encoder.encode_one(record)
    assert learnt(tokenizer, example) == "3 + 4 = 7 </s>"
    prompt = encoder.prompt(record)
    assert example.input_ids[: len(prompt)] == prompt
    assert example.labels[: len(prompt)] == [IGNORED] * len(prompt)
    assert prompt[0] == tokenizer.bos_token_id


def test_alpaca_prompt_has_the_input_only_if_there_is_one():
    assert "### Input:\nsome\n\n### Response:\n" in alpaca_prompt("do", "some")
    assert "Input" not in alpaca_prompt("do", "")
    assert "paired" not in alpaca_prompt("do", "")


def test_plain_text_is_learnt_as_a_whole(tokenizer):
    example = Encoder(tokenizer, "plain", 64).encode_one(PlainText("3 + 4 = 7"))
    assert example.labels == example.input_ids
    assert tokenizer.decode(example.input_ids) == "<s> 3 + 4 = 7 </s>"


@pytest.mark.parametrize("templated", [True, False])
def test_chat_learns_the_assistants_turns_only(tokenizer, chat_tokenizer, templated):
    used = chat_tokenizer if templated else tokenizer
    example = Encoder(used, "plain", 64).encode_one(CHAT)
    assert learnt(used, example) == "3 + 4 </s> = 7 </s>"
    labelled = [(i, label) for i, label in zip(*example, strict=True) if label != IGNORED]
    assert all(i == label for i, label in labelled)


@pytest.mark.parametrize("templated", [True, False])
def test_a_chat_prompt_is_the_beginning_of_the_chat(tokenizer, chat_tokenizer, templated):
    encoder = Encoder(chat_tokenizer if templated else tokenizer, "plain", 64)
    example, prompt = encoder.encode_one(CHAT), encoder.prompt(CHAT)
    assert example.input_ids[: len(prompt)] == prompt
    assert example.labels[len(prompt)] != IGNORED
    assert example.labels[len(prompt) - 1] == IGNORED


def test_a_template_that_drops_earlier_turns_is_not_trusted(tokenizer):
    forgetful = demo_tokenizer()
    forgetful.chat_template = (
        "{% for m in messages %}<s> {{ m.role }} "
        "{% if m.role != 'assistant' or loop.last %}{{ m.content }} {% endif %}</s>{% endfor %}"
        "{% if add_generation_prompt %}<s> assistant {% endif %}"
    )
    example = Encoder(forgetful, "plain", 64).encode_one(CHAT)
    assert "3 + 4" not in learnt(forgetful, example)
    assert learnt(forgetful, example).endswith("= 7 </s>")


def test_cut_and_dropped_texts_are_counted(tokenizer):
    records = [
        PlainText("1 + 1 = 2"),  # 7 tokens
        PlainText("1 + 1 = 2 1 + 1 = 2"),  # 12: cut
        Instruction("How many apples did Ada find in the box now", "3"),  # prompt alone fills it: dropped
    ]
    encoded = Encoder(tokenizer, "plain", 8).encode(records, "d.jsonl")
    assert (len(encoded.examples), encoded.num_cut, encoded.num_dropped) == (2, 2, 1)
    assert [len(e.input_ids) for e in encoded.examples] == [7, 8]
    with pytest.raises(DataError, match=r"d\.jsonl: 1 of 1 texts have no token to learn"):
        Encoder(tokenizer, "plain", 8).encode(records[2:], "d.jsonl")


def test_a_prompt_that_leaves_room_for_one_token_is_kept(tokenizer):
    record = Instruction("1 + 1", "2")  # <s> 1 + 1 | 2 </s>
    kept = Encoder(tokenizer, "plain", 5).encode([record], "d").examples[0]
    assert kept == Example([1, *tokenizer("1 + 1 2", add_special_tokens=False)["input_ids"]], kept.labels)
    assert kept.labels[:4] == [IGNORED] * 4
    assert kept.labels[4] == kept.input_ids[4]


def test_every_choice_of_template_can_be_encoded():
    assert tuple(TEMPLATES) == get_args(Template)


def test_a_tokenizer_without_an_end_is_refused():
    endless = demo_tokenizer()
    endless.eos_token = None
    with pytest.raises(ConfigError, match="no end-of-sequence token"):
        Encoder(endless, "plain", 64)


def test_batches_are_padded_on_the_right_and_counted():
    collate = Collator(pad_token_id=9)
    batch = collate([Example([1, 2, 3], [IGNORED, 2, 3]), Example([4], [4])])
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 2, 3], [4, IGNORED, IGNORED]]
    collate([Example([1], [1])])
    assert collate.num_tokens == 5


@pytest.mark.parametrize("templated", [True, False])
def test_messages_of_weight_zero_are_read_and_not_learnt(tokenizer, chat_tokenizer, templated):
    used = chat_tokenizer if templated else tokenizer
    chat = Chat(CHAT.messages, unlearnt=(1,))
    example = Encoder(used, "plain", 64).encode_one(chat)
    assert example.input_ids == Encoder(used, "plain", 64).encode_one(CHAT).input_ids
    assert learnt(used, example) == "= 7 </s>"


@pytest.mark.parametrize("templated", [True, False])
@pytest.mark.parametrize("system", [(), (("system", "Ada has"),)])
def test_only_the_reply_is_learnt_if_the_assistant_speaks_first(tokenizer, templated, system):
    """The template adds a system prompt of its own, as those of SmolLM2 and Qwen2 do."""
    used = demo_tokenizer()
    if templated:
        used.chat_template = (
            "{% for m in messages %}"
            "{% if loop.first and m.role != 'system' %}<s> system How many </s>{% endif %}"
            "<s> {{ m.role }} {{ m.content }} </s>{% endfor %}"
            "{% if add_generation_prompt %}<s> assistant {% endif %}"
        )
    chat = Chat((*system, ("assistant", "3 + 4"), ("user", "in all"), ("assistant", "= 7")))
    assert learnt(used, Encoder(used, "plain", 64).encode_one(chat)) == "3 + 4 </s> = 7 </s>"


@pytest.mark.parametrize("template", TEMPLATES)
def test_system_and_history_are_part_of_the_prompt(tokenizer, template):
    encoder = Encoder(tokenizer, template, 512)
    alone = Instruction("How many now", "7", "4 more")
    record = Instruction(
        "How many now", "7", "4 more", system="Ada has", history=(("3 + 0", "3"), ("4 + 0", "4"))
    )
    example, prompt = encoder.encode_one(record), encoder.prompt(record)
    assert learnt(tokenizer, example) == "7 </s>"
    assert example.input_ids[: len(prompt)] == prompt
    assert prompt.count(tokenizer.bos_token_id) == 1
    assert prompt[-len(encoder.prompt(alone)) + 1 :] == encoder.prompt(alone)[1:]
    assert prompt.count(tokenizer.eos_token_id) == 2  # each earlier reply ends
    assert tokenizer.decode(prompt).startswith("<s> Ada has")
    for words in ("3 + 0", "3 </s>", "4 + 0", "4 </s>"):
        assert words in tokenizer.decode(prompt)


def test_a_template_that_refuses_a_turn_is_named_with_the_record():
    strict = demo_tokenizer()
    strict.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    chats = [
        Chat((("user", "1 + 1"), ("assistant", "2"))),
        Chat((("system", "Be brief."), ("user", "1 + 1"), ("assistant", "2"))),
    ]
    says = r"data\.jsonl: record 2: the model's chat template refuses .* system, user.*: System role not supported; "
    with pytest.raises(DataError, match=says):
        Encoder(strict, "plain", 32).encode(chats, "data.jsonl")
