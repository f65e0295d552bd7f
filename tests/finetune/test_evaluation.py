"""Held-out loss and generated answers.

Would catch: a loss that depends on the batch size or counts padding and prompts; an answer that depends on
its neighbours in the batch; left padding without its mask; a row of answers without its question; a model left in
evaluation mode.
"""

import pytest
import torch
from transformers import AutoModelForCausalLM

from grass.finetune.data import read_records
from grass.finetune.encoding import IGNORED, Encoder
from grass.finetune.evaluation import answer_questions, heldout_loss, make_questions
from grass.finetune.scoring import rules_for


@pytest.fixture(scope="module")
def model(tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():  # larger weights: answers that depend on the question
        for p in model.parameters():
            p.mul_(8.0)
    return model


@pytest.fixture(scope="module")
def encoder(tokenizer):
    return Encoder(tokenizer, "plain", 64)


@pytest.fixture(scope="module")
def records(problem_files):
    return read_records(problem_files[1]).records


def test_loss_is_the_mean_over_learnt_tokens_at_any_batch_size(model, encoder, records):
    examples = encoder.encode(records, "d").examples
    total, count = 0.0, 0
    with torch.no_grad():
        for example in examples:
            logits = model(input_ids=torch.tensor([example.input_ids])).logits[0]
            for t, label in enumerate(example.labels[1:]):
                if label != IGNORED:
                    total -= float(logits[t].log_softmax(-1)[label])
                    count += 1
    for batch_size in (1, 3, 100):
        assert heldout_loss(model, examples, batch_size, 0) == pytest.approx(total / count, rel=1e-5)


def test_answers_do_not_depend_on_the_batch(model, encoder, records):
    model.train()
    rules = rules_for([r.answer for r in records])
    questions, num_cut = make_questions(encoder, records, 64, 6)
    assert num_cut == 0
    one = answer_questions(model, encoder.tokenizer, questions, rules, 1, 6, 0)
    done = []
    all_at_once = answer_questions(model, encoder.tokenizer, questions, rules, 100, 6, 0, done.append)
    assert model.training
    assert one == all_at_once
    assert done == [len(records)]
    assert [a.expected for a in one] == [r.answer for r in records]
    assert [a.prompt for a in one] == [encoder.tokenizer.decode(encoder.prompt(r)) for r in records]
    assert {a.rule for a in one} == {"number"}
    assert [a.correct for a in one] == [rules[a.expected].is_right(a.generated, a.expected) for a in one]
    assert len({a.generated for a in one}) > 1  # else the test could not fail


def test_prompts_may_be_as_long_as_the_positions_allow(tokenizer, records):
    short = Encoder(tokenizer, "plain", 12)  # the context of training
    whole = [short.prompt(record) for record in records]
    for positions in (None, 10_000, max(map(len, whole)) + 6):
        questions, num_cut = make_questions(short, records, positions, 6)
        assert [q.prompt for q in questions] == whole
        assert num_cut == 0
    longest = max(whole, key=len)
    questions, num_cut = make_questions(short, records, len(longest) + 5, 6)
    assert num_cut == sum(len(prompt) == len(longest) for prompt in whole) <= len(whole) / 2
    assert questions[whole.index(longest)].prompt == longest[1:]
    assert make_questions(short, [], 10, 20) == ([], 0)
