"""Scoring of generated answers.

Would catch: a score that is not LLM-Adapters' (another tolerance, another number, whole words where they search
letters); a rule that needs every option to occur among the expected answers; a mixed file scored by one rule; a
number compared as text; a choice found inside another word.

The rules of LLM-Adapters are written a second time below, by data set and from their description, and compared on
their own files, which are not part of the project (see `llm_adapters` in tests/conftest.py).
"""

import json
import math
import re

import pytest

from grass.finetune.scoring import count_rules, rules_for

ARITHMETIC = ("MultiArith", "AddSub", "SingleEq", "SVAMP", "gsm8k")
OPTIONS = {
    "AQuA": ["A", "B", "C", "D", "E"],
    "boolq": ["true", "false"],
    "ARC-Easy": [f"answer{i}" for i in range(1, 6)],
    "ARC-Challenge": [f"answer{i}" for i in range(1, 6)],
    "openbookqa": [f"answer{i}" for i in range(1, 6)],
    "social_i_qa": [f"answer{i}" for i in range(1, 6)],
    "piqa": ["solution1", "solution2"],
    "winogrande": ["option1", "option2"],
    "hellaswag": [f"ending{i}" for i in range(1, 5)],
}

# Made-up records in the form of those files: (data set, generated text, answer, right by LLM-Adapters' rules).
EXCERPT = [
    ("AddSub", "\nA: She has 3.51 + 0.04 = 3.55 dollars. The answer is 3.55.", "3.55", True),
    ("AddSub", "\nA: Together 22.2999 miles.", "22.3", True),  # within 0.001
    ("AddSub", "The answer is 22.302.", "22.3", False),
    ("SingleEq", "It takes 1,250 steps. The answer is 1,250.00.", "1250.0", True),
    ("SingleEq", "The answer is 10-3", "3", False),  # their last number is -3
    ("SVAMP", "The answer is 7. It is not 8", "7.0", False),
    ("MultiArith", "", "4.0", False),
    ("gsm8k", "nothing to count", "0.0", False),
    ("AQuA", "\nRationale: the sum is 12. The answer is (C).", "C", True),
    ("AQuA", "The Answer is (C)", "C", False),  # their first letter is that of "Answer"
    ("AQuA", "42", "E", False),
    ("boolq", "the correct answer is true", "true", True),
    ("boolq", "untrue, that is false", "true", True),  # they search inside words
    ("ARC-Easy", "the correct answer is answer5", "answer5", True),
    ("ARC-Challenge", "answer2, not answer1", "answer1", False),
    ("openbookqa", "answer12", "answer1", True),
    ("social_i_qa", "the correct answer is", "answer3", False),
    ("piqa", "the correct answer is solution2", "solution2", True),
    ("winogrande", "the correct answer is option1", "option2", False),
    ("hellaswag", "the correct answer is ending4", "ending4", True),
]


def right_by_llm_adapters(dataset, generated, answer):
    """Score by hand, without the code under test."""
    if dataset in ARITHMETIC:
        numbers = re.findall(r"-?[0-9]+(?:\.[0-9]*)?", "".join(generated.split(",")))
        return math.fabs(float(answer) - float(numbers[-1])) <= 0.001 if numbers else False
    places = {option: generated.find(option) for option in OPTIONS[dataset]}
    found = [option for option, place in places.items() if place >= 0]
    return bool(found) and min(found, key=places.__getitem__) == answer


def score(pairs):
    """Score (generated, answer) pairs by the code under test."""
    rules = rules_for([answer for _, answer in pairs])
    return [rules[answer].is_right(generated, answer) for generated, answer in pairs]


@pytest.mark.parametrize(("dataset", "generated", "answer", "right"), EXCERPT)
def test_one_record_scores_as_in_llm_adapters(dataset, generated, answer, right):
    """Alone, so that one distinct answer occurs."""
    assert right_by_llm_adapters(dataset, generated, answer) is right
    assert score([(generated, answer)]) == [right]


def test_a_file_of_several_tasks_scores_as_in_llm_adapters():
    pairs = [(generated, answer) for _, generated, answer, _ in EXCERPT]
    assert score(pairs) == [right for *_, right in EXCERPT]


@pytest.mark.parametrize("dataset", [name for name in (*ARITHMETIC, *OPTIONS) if name != "hellaswag"])
def test_gold_outputs_score_as_in_llm_adapters(llm_adapters, dataset):
    records = json.loads((llm_adapters / dataset / "test.json").read_text(encoding="utf-8"))
    pairs = [(record["output"], record["answer"]) for record in records]
    expected = [right_by_llm_adapters(dataset, *pair) for pair in pairs]
    assert score(pairs) == expected
    print(f"{dataset}: {len(records)} records, {sum(expected)} right")  # shown by pytest -rP
    for answer in {answer for _, answer in pairs}:  # a held-out part in which one answer occurs
        chosen = [i for i, pair in enumerate(pairs) if pair[1] == answer]
        assert score([pairs[i] for i in chosen]) == [expected[i] for i in chosen]


@pytest.mark.parametrize(
    ("generated", "expected", "right"),
    [
        ("12 + 7 = 19", "19", True),
        ("the answer is 19.", "19", True),
        ("it is 1,234.50 dollars", "1234.5", True),
        ("it is 1234.5 dollars", "1,234.5", True),
        ("19 apples, not 18", "19", False),
        ("minus: -3", "-3", True),
        ("12 + 7 =", "19", False),
        ("1e3", "1e+20", False),
        ("nothing", "19", False),
    ],
)
def test_numbers_match_by_value_and_the_last_one_counts(generated, expected, right):
    assert score([(generated, expected)]) == [right]


@pytest.mark.parametrize(
    ("generated", "answers", "name", "right"),
    [
        ("unlike no, yes", ["yes", "no"] * 2, "options", False),
        ("knowing that: yes", ["yes", "no"] * 2, "options", True),
        ("it is yes", ["yes", "yes"], "options", True),  # one distinct answer
        ("it is AB", ["AB", "A", "B", "O"] * 2, "options", True),  # blood groups are not the letters A to E
        ("it is J", ["J", "A"] * 2, "options", True),
        ("C++ it is", ["C++", "C"] * 2, "options", True),
        ("  New   york ", ["new York", "Rome"], "text", True),
        ("New York City", ["New York", "Rome"], "text", False),
        ("inf", ["inf"], "text", True),
        ("true", ["true", "Rome"], "true|false", True),
        ("the A", ["A", "3"], "letter A..E", True),
    ],
)
def test_the_expected_answers_decide_the_rule(generated, answers, name, right):
    rules = rules_for(answers)
    assert rules[answers[0]].name == name
    assert rules[answers[0]].is_right(generated, answers[0]) is right


def test_rules_are_counted_by_name():
    answers = ["3", "4", "true", "5", "B"]
    counts = count_rules(rules_for(answers), answers)
    assert counts == {"number": 3, "true|false": 1, "letter A..E": 1}
    assert next(iter(counts)) == "number"
    assert rules_for([]) == {}
