"""Tasks of the study: texts for the base model, and two tasks that it does not know.

* Base: plain sums, look-ups of options, and easy problems about ages; generated from the base's seed.
* ``arithmetic``: word problems whose sums the base knows, with the working as the answer.
* ``relations``: two facts about ages, options, and a question for the oldest or the youngest of three.

Training and held-out problems have disjoint *contents* (template and numbers, or the order of the people). The sums of
most held-out word problems occur in training in other templates: the base knows sums, and the task is to read.
"""

import itertools
import random
from collections.abc import Iterator, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from grass.finetune.arithmetic import NAMES, plain_sums, vocabulary, word_problems

IGNORED = -100
SPECIAL = ("<pad>", "<s>", "</s>")
PEOPLE = 3  # in a problem about ages
_RELATION = (
    "is",
    "older",
    "than",
    "Who",
    "the",
    "oldest",
    "youngest",
    "?",
    ".",
    ":",
    "option1",
    "option2",
    "option3",
)


class Problem(NamedTuple):
    """Prompt and answer, as words between spaces."""

    prompt: str
    answer: str


@cache
def token_ids() -> dict[str, int]:
    """Return the id of each word of the study."""
    return {word: i for i, word in enumerate(dict.fromkeys((*SPECIAL, *vocabulary(), *_RELATION)))}


def encode(text: str) -> list[int]:
    """Return the token ids of words between spaces."""
    ids = token_ids()
    return [ids[word] for word in text.split()]


def _spaced(text: str) -> str:
    for sign in ".,?":
        text = text.replace(sign, f" {sign} ")
    return " ".join(text.split())


def _fact(older: str, younger: str) -> str:
    return f"{older} is older than {younger} ."


def base_texts(seed: int) -> list[str]:
    """Return the texts that the base model learns.

    They are every plain sum, and half as many each of look-ups of all options of a list, and of the easiest problems
    about ages: facts in order, and a question for the oldest.
    """
    rng = random.Random(seed)
    sums = [record["text"] for record in plain_sums()]
    half = len(sums) // 2
    lookups = [_lookups(rng.sample(NAMES, PEOPLE), rng) for _ in range(half)]
    easy = [_relation(rng, rng.sample(NAMES, PEOPLE), is_easy=True) for _ in range(half)]
    return sums + lookups + [f"{problem.prompt} {problem.answer}" for problem in easy]


def _lookups(people: Sequence[str], rng: random.Random) -> str:
    asked = [f"{name} : option{i}" for i, name in enumerate(people, start=1)]
    rng.shuffle(asked)
    return f"{_options(people)} . {' . '.join(asked)}"


def _options(people: Sequence[str]) -> str:
    return " ".join(f"option{i} : {name}" for i, name in enumerate(people, start=1))


def arithmetic(num_train: int, num_heldout: int, seed: int) -> tuple[list[Problem], list[Problem]]:
    """Return training and held-out word problems."""
    train, heldout = word_problems(num_train, num_heldout, seed)
    return tuple(
        [Problem(_spaced(p.question), p.record["output"]) for p in part] for part in (train, heldout)
    )  # type: ignore[return-value]


def relations(num_train: int, num_heldout: int, seed: int) -> tuple[list[Problem], list[Problem]]:
    """Return training and held-out problems about ages; no order of people is in both, nor any text of the base."""
    rng = random.Random(seed)
    orders = list(itertools.permutations(NAMES, PEOPLE))
    rng.shuffle(orders)
    heldout = [_relation(rng, order) for order in orders[:num_heldout]]
    return [_relation(rng, rng.choice(orders[num_heldout:])) for _ in range(num_train)], heldout


def _relation(rng: random.Random, order: Sequence[str], *, is_easy: bool = False) -> Problem:
    """Return a question for an end of an order of people, given by its neighbours.

    Args:
        rng: chooses what is free.
        order: the people, the oldest first.
        is_easy: facts are in order, and the question is for the oldest; otherwise any other form.
    """
    facts = [_fact(a, b) for a, b in itertools.pairwise(order)]
    oldest, in_order = (True, True) if is_easy else rng.choice([(True, False), (False, True), (False, False)])
    if not in_order:
        facts.reverse()
    options = rng.sample(order, len(order))
    asked = order[0] if oldest else order[-1]
    question = f"Who is the {'oldest' if oldest else 'youngest'} ?"
    return Problem(
        f"{' '.join(facts)} {_options(options)} {question}", f"{asked} : option{options.index(asked) + 1}"
    )


TASKS = {"arithmetic": arithmetic, "relations": relations}


class Data:
    """Problems as tensors, padded on the right.

    Args:
        problems: prompts and answers.
        whole: every token is a target, not only those of the answer and its end.

    Attributes:
        problems: the problems.
    """

    def __init__(self, problems: Sequence[Problem], *, whole: bool = False) -> None:
        self.problems = list(problems)
        start, end = encode("<s>"), encode("</s>")
        rows = [(start + encode(p.prompt), encode(p.answer) + end) for p in problems]
        self._lengths = torch.tensor([len(prompt) + len(answer) for prompt, answer in rows])
        self._ids = torch.zeros(len(rows), int(self._lengths.max()), dtype=torch.int64)
        self._labels = torch.full_like(self._ids, IGNORED)
        for i, (prompt, answer) in enumerate(rows):
            text, first = torch.tensor(prompt + answer), 0 if whole else len(prompt)
            self._ids[i, : len(text)] = text
            self._labels[i, first : len(text)] = text[first:]

    def __len__(self) -> int:
        return len(self.problems)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return token ids and labels of some problems, int64 [len(indices), longest]."""
        longest = int(self._lengths[indices].max())
        return self._ids[indices, :longest], self._labels[indices, :longest]

    def batches(self, size: int, steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches of shuffled problems, epoch after epoch."""
        generator = torch.Generator().manual_seed(seed)
        order = torch.empty(0, dtype=torch.int64)
        for _ in range(steps):
            if len(order) < size:
                order = torch.randperm(len(self), generator=generator)
            yield self.batch(order[:size])
            order = order[size:]
