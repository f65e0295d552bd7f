"""Rules by which a generated text is right: those of LLM-Adapters, and two for all other answers.

The expected answer decides which rule applies, so a file may mix tasks:

============================  ======================================================================
name                          right if
============================  ======================================================================
``number``                    the last number of the text, commas removed, is within 0.001
``true|false``                the first of these in the text is the expected one, wherever it stands
``answer1..5``                the same
``solution1|2``               the same
``option1|2``                 the same
``ending1..4``                the same
``letter A..E``               the same for capital letters, if all other answers are such letters
``options``                   the first answer of the file that the text holds as whole words is the
                              expected one; if the file has few distinct answers, often repeated
``text``                      the whole text is equal, up to case and white space
============================  ======================================================================

Source: evaluate.py and commonsense_evaluate.py of LLM-Adapters, whose scores the first seven give. They search letters
and options inside words: the first letter of "Answer: B" is A.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

TOLERANCE = 0.001  # of numbers, absolute

_NUMBER = re.compile(r"-?\d+\.?\d*")
_LETTERS = ("A", "B", "C", "D", "E")
_OPTIONS = {
    "true|false": ("true", "false"),
    "answer1..5": ("answer1", "answer2", "answer3", "answer4", "answer5"),
    "solution1|2": ("solution1", "solution2"),
    "option1|2": ("option1", "option2"),
    "ending1..4": ("ending1", "ending2", "ending3", "ending4"),
}
_MAX_OPTIONS = 20  # with more distinct answers, the task is not treated as multiple choice


@dataclass(frozen=True)
class Rule:
    """Rule of scoring.

    Args:
        name: name of the rule in the log and the results.
        is_right: True if a text (first argument) gives the expected answer (second).
    """

    name: str
    is_right: Callable[[str, str], bool]


def rules_for(expected: Iterable[str]) -> dict[str, Rule]:
    """Return the rule of each expected answer of an evaluation.

    Args:
        expected: the expected answers, one for each record: how often they occur matters for ``options``.
    """
    counts = Counter(expected)
    rules = {answer: rule for answer in counts if (rule := _rule_of(answer)) is not None}
    others = {answer: count for answer, count in counts.items() if answer not in rules}
    rule = _rule_of_others(others)
    return rules | dict.fromkeys(others, rule)


def count_rules(rules: Mapping[str, Rule], expected: Iterable[str]) -> dict[str, int]:
    """Return the number of expected answers by name of their rule, the most frequent first."""
    return dict(Counter(rules[answer].name for answer in expected).most_common())


def _rule_of(answer: str) -> Rule | None:
    """Return the rule that an answer determines by itself."""
    if _is_number(answer):
        return Rule("number", _last_number_is_near)
    for name, options in _OPTIONS.items():
        if answer in options:
            return Rule(name, _first_is_expected("|".join(options)))
    return None


def _rule_of_others(counts: Mapping[str, int]) -> Rule:
    """Return the rule of the answers that do not determine one by themselves, given how often each occurs."""
    if set(counts) <= set(_LETTERS):
        return Rule("letter A..E", _first_is_expected("|".join(_LETTERS)))
    if len(counts) <= _MAX_OPTIONS and sum(counts.values()) >= 2 * len(counts):
        longest_first = sorted(counts, key=len, reverse=True)
        return Rule(
            "options", _first_is_expected(rf"(?<!\w)(?:{'|'.join(map(re.escape, longest_first))})(?!\w)")
        )
    return Rule("text", _text_is_equal)


def _is_number(answer: str) -> bool:
    try:
        return math.isfinite(float(answer.replace(",", "")))
    except ValueError:
        return False


def _last_number_is_near(generated: str, expected: str) -> bool:
    numbers = _NUMBER.findall(generated.replace(",", ""))
    return bool(numbers) and abs(float(expected.replace(",", "")) - float(numbers[-1])) <= TOLERANCE


def _first_is_expected(pattern: str) -> Callable[[str, str], bool]:
    compiled = re.compile(pattern)

    def is_right(generated: str, expected: str) -> bool:
        found = compiled.search(generated)
        return found is not None and found.group() == expected

    return is_right


def _text_is_equal(generated: str, expected: str) -> bool:
    return generated.lower().split() == expected.lower().split()
