"""The built-in task.

Would catch: a wrong answer or working; a template with the wrong operation; a problem in both sets; a seed
that does not decide everything; a word that the demo's tokenizer does not know; a number out of range.
"""

import re

import pytest

from grass.finetune.arithmetic import LARGEST, TEMPLATES, plain_sums, vocabulary, word_problems

# What each kind of question asks for, worked out here by reading the words alone.
READINGS = [
    (r"gives \w+ \d+ more", lambda a, b: a + b),
    (r"find together", lambda a, b: a + b),
    (r"in all", lambda a, b: a + b),
    (r"in the morning and", lambda a, b: a + b),
    (r"has \d+ \w+ more than", lambda a, b: a + b),
    (r"were there before", lambda a, b: a + b),
    (r"are left", lambda a, b: a - b),
    (r"in the box now", lambda a, b: a - b),
    (r"lost \d+ of them", lambda a, b: a - b),
    (r"How many more \w+ does \w+ have than", lambda a, b: a - b),
    (r"How many more \w+ does \w+ need", lambda a, b: a - b),
    (r"are of \w+\?$", lambda a, b: a - b),
]


@pytest.fixture(scope="module")
def problems():
    return word_problems(3000, 200, seed=0)


def test_answers_are_right_by_an_independent_reading(problems):
    seen = set()
    for problem in problems[0] + problems[1]:
        record = problem.record
        matching = [i for i, (pattern, _) in enumerate(READINGS) if re.search(pattern, record["instruction"])]
        assert len(matching) == 1, record
        seen.add(matching[0])
        first, second = map(int, re.findall(r"\d+", record["instruction"]))
        expected = READINGS[matching[0]][1](first, second)
        assert record["answer"] == str(expected)
        left, right = record["output"].split(" = ")
        assert right == record["answer"]
        x, sign, y = left.split()
        assert (x, y) == (str(first), str(second))
        assert {"+": int(x) + int(y), "-": int(x) - int(y)}[sign] == expected
        assert 0 <= expected <= LARGEST
    assert len(seen) == len(READINGS) == len(TEMPLATES)


def test_train_and_heldout_share_no_template_with_the_same_numbers(problems):
    train, heldout = problems
    assert (len(train), len(heldout)) == (3000, 200)
    assert not {p.content for p in train} & {p.content for p in heldout}

    def bare(problem):  # what is left without names and things
        words = problem.question.replace(".", "").replace("?", "").replace(",", "").split()
        return problem.template, tuple(word for word in words if word.isdigit())

    assert not {bare(p) for p in train} & {bare(p) for p in heldout}


def test_the_seed_decides_everything():
    assert word_problems(50, 5, seed=1) == word_problems(50, 5, seed=1)
    assert word_problems(50, 5, seed=1) != word_problems(50, 5, seed=2)
    with pytest.raises(ValueError, match="more than the"):
        word_problems(10**6, 1, seed=0)


def test_plain_sums_are_true():
    texts = [record["text"] for record in plain_sums()]
    assert len(set(texts)) == len(texts) > 1000
    for text in texts:
        a, sign, b, equals, c = text.split()
        assert equals == "="
        assert int(c) == (int(a) + int(b) if sign == "+" else int(a) - int(b))


def test_the_tokenizer_knows_every_word(problems, tokenizer):
    assert len(set(vocabulary())) == len(vocabulary())
    unknown = tokenizer.unk_token_id
    for problem in problems[0]:
        assert unknown not in tokenizer(problem.question)["input_ids"]
        assert unknown not in tokenizer(problem.record["output"])["input_ids"]
