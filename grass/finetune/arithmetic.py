"""The built-in task: plain sums, and word problems that need the same sums.

Everything is generated from a seed, so the demo needs no download and no file. A problem's *content* is
its template and its two numbers; names and things are decoration. Training and held-out problems never
share a content, so a held-out problem cannot be answered from memory of the same question.
"""

import random
from typing import NamedTuple

LARGEST = 40  # no operand and no result is larger
SMALLEST = 2  # of the operands of word problems: "1 coins" would be wrong

NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gina", "Hugo", "Iris", "Jon")
THINGS = ("apples", "books", "coins", "shells", "stamps", "stones", "pens", "cards", "eggs", "cups")

# (operation, text): a is the first number told and b the second.
TEMPLATES: tuple[tuple[str, str], ...] = (
    ("+", "{x} has {a} {things}. {y} gives {x} {b} more. How many {things} does {x} have now?"),
    ("+", "{x} found {a} {things} and {y} found {b}. How many {things} did they find together?"),
    ("+", "There are {a} {things} in one box and {b} in the other. How many {things} are there in all?"),
    ("+", "{x} bought {a} {things} in the morning and {b} in the evening. How many did {x} buy?"),
    ("+", "{y} has {a} {things}. {x} has {b} {things} more than {y}. How many does {x} have?"),
    ("+", "After {x} took {a} {things} away, {b} were left. How many {things} were there before?"),
    ("-", "{x} has {a} {things} and gives {b} to {y}. How many {things} are left?"),
    ("-", "There were {a} {things} in a box. {x} took {b} away. How many {things} are in the box now?"),
    ("-", "{x} had {a} {things} and lost {b} of them. How many does {x} have now?"),
    ("-", "{x} has {a} {things} and {y} has {b}. How many more {things} does {x} have than {y}?"),
    ("-", "{x} needs {a} {things} and has {b}. How many more {things} does {x} need?"),
    ("-", "{x} and {y} have {a} {things} together. {b} are of {y}. How many {things} are of {x}?"),
)


class Problem(NamedTuple):
    """One word problem; `content` is what must not be shared between training and held-out sets."""

    template: int
    a: int
    b: int
    question: str

    @property
    def content(self) -> tuple[int, int, int]:
        """Template and numbers."""
        return self.template, self.a, self.b

    @property
    def record(self) -> dict[str, str]:
        """The problem in LLM-Adapters' format: instruction, output, answer."""
        operation = TEMPLATES[self.template][0]
        answer = self.a + self.b if operation == "+" else self.a - self.b
        working = f"{self.a} {operation} {self.b} = {answer}"
        return {"instruction": self.question, "output": working, "answer": str(answer)}


def plain_sums() -> list[dict[str, str]]:
    """Every sum and difference in range, as plain text: ``{"text": "12 + 7 = 19"}``."""
    numbers = range(LARGEST + 1)
    sums = [f"{a} + {b} = {a + b}" for a in numbers for b in numbers if a + b <= LARGEST]
    differences = [f"{a} - {b} = {a - b}" for a in numbers for b in numbers if a >= b]
    return [{"text": text} for text in sums + differences]


def word_problems(num_train: int, num_heldout: int, seed: int) -> tuple[list[Problem], list[Problem]]:
    """Draw training and held-out word problems, all with different contents.

    Args:
        num_train: problems to train on.
        num_heldout: problems to evaluate on.
        seed: of the generator; the same seed gives the same problems.

    Returns:
        Training problems, held-out problems.

    Raises:
        ValueError: more problems than there are contents.
    """
    contents = [
        (template, a, b)
        for template, (operation, _) in enumerate(TEMPLATES)
        for a in range(SMALLEST, LARGEST + 1)
        for b in range(SMALLEST, LARGEST + 1)
        if (a + b <= LARGEST if operation == "+" else a - b >= SMALLEST)
    ]
    if num_train + num_heldout > len(contents):
        raise ValueError(f"{num_train} + {num_heldout} problems are more than the {len(contents)} there are")
    rng = random.Random(seed)
    rng.shuffle(contents)
    problems = [_tell(rng, *content) for content in contents[: num_train + num_heldout]]
    return problems[num_heldout:], problems[:num_heldout]


def _tell(rng: random.Random, template: int, a: int, b: int) -> Problem:
    x, y = rng.sample(NAMES, 2)
    question = TEMPLATES[template][1].format(x=x, y=y, things=rng.choice(THINGS), a=a, b=b)
    return Problem(template, a, b, question)


def vocabulary() -> list[str]:
    """Every word, number and sign the task can show, sorted: numbers first, then words."""
    words = set(NAMES) | set(THINGS) | {"+", "-", "="}
    for _, text in TEMPLATES:
        for blank in ("{x}", "{y}", "{a}", "{b}", "{things}"):
            text = text.replace(blank, " ")
        words |= set(text.replace(".", " . ").replace("?", " ? ").replace(",", " , ").split())
    return [str(number) for number in range(LARGEST + 1)] + sorted(words)
