"""Built-in task: plain sums, and word problems that need the same sums.

All data is generated from a seed, so the demo needs no download. The *content* of a problem is its template and its
two numbers; names and things vary at random. Training and held-out problems have disjoint contents, so that a held-out
problem cannot be answered by memorizing the training set.
"""

import random
from typing import NamedTuple

LARGEST = 40  # no operand and no result is larger
SMALLEST = 2  # of the operands of word problems: "1 coins" would be wrong

NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gina", "Hugo", "Iris", "Jon")
THINGS = ("apples", "books", "coins", "shells", "stamps", "stones", "pens", "cards", "eggs", "cups")

# (operation, text): a is the first number in the text, b the second.
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
    """Word problem. Training and held-out problems must not share a `content`."""

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
        """The problem in the format of LLM-Adapters: instruction, output, answer."""
        operation = TEMPLATES[self.template][0]
        answer = self.a + self.b if operation == "+" else self.a - self.b
        working = f"{self.a} {operation} {self.b} = {answer}"
        return {"instruction": self.question, "output": working, "answer": str(answer)}


def plain_sums() -> list[dict[str, str]]:
    """Return every sum and difference in range as plain text: ``{"text": "12 + 7 = 19"}``."""
    numbers = range(LARGEST + 1)
    sums = [f"{a} + {b} = {a + b}" for a in numbers for b in numbers if a + b <= LARGEST]
    differences = [f"{a} - {b} = {a - b}" for a in numbers for b in numbers if a >= b]
    return [{"text": text} for text in sums + differences]


def word_problems(num_train: int, num_heldout: int, seed: int) -> tuple[list[Problem], list[Problem]]:
    """Generate training and held-out word problems, all with different contents.

    Args:
        num_train: number of training problems.
        num_heldout: number of held-out problems.
        seed: seed of the generator.

    Returns:
        Training problems and held-out problems.

    Raises:
        ValueError: there are fewer contents than problems.
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
    """Return every word, number and sign of the task: first the numbers, then the words, sorted."""
    words = set(NAMES) | set(THINGS) | {"+", "-", "="}
    for _, text in TEMPLATES:
        for blank in ("{x}", "{y}", "{a}", "{b}", "{things}"):
            text = text.replace(blank, " ")
        words |= set(text.replace(".", " . ").replace("?", " ? ").replace(",", " , ").split())
    return [str(number) for number in range(LARGEST + 1)] + sorted(words)
