"""Comparisons of methods in the stored rows of study A."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

import numpy as np

from bench.quality.methods import ACTIVE, RULES, SETTINGS
from bench.quality.statistics import (
    Contrast,
    Mean,
    contrast,
    corrected_p_values,
    detectable,
    holm,
    mean_of,
    verdict,
)
from bench.quality.study import (
    AGAIN,
    ALTERNATIVES,
    CHOSEN,
    KEY,
    NEW_RULES,
    REMOVED,
    SEARCH,
    STUDY,
    SUGGESTED,
    Part,
    rate_of,
)
from grass.errors import GrassError
from grass.finetune.run_folder import read_rows
from grass.reproduce.study import Pair, Row

Names = tuple[str, str]
"""A method and the one it is compared with."""
MEMORY, NORMS = "memory.jsonl", "norms.jsonl"
"""Files of predicted peaks, which the command that draws them writes, and of norms of the real model's layers."""
PAPER_GB = 24
"""Device memory of which the paper says what fits, GB."""
FEWEST = 8
"""Pairs that a comparison needs: of fewer no interval is right, and they would spoil the correction of others."""


def log_loss(row: Row) -> float:
    """Return the held-out log-loss, nats a token."""
    return float(row["log_loss"])


def exact(row: Row) -> float:
    """Return the exact match in percent."""
    return 100 * float(row["exact"])


class Compared(NamedTuple):
    """A method against another one.

    Attributes:
        log_loss: difference of held-out log-loss.
        exact: difference of exact match, points.
        p_value: of the log-loss, corrected for the number of comparisons.
        verdict: "better", "worse" or "undecided", by the log-loss.
        exact_p_value, exact_verdict: the same of the exact match.
        bases: mean difference of log-loss of each base model.
        diverged: number of pairs that are left out as a run of them diverged.
    """

    log_loss: Contrast
    exact: Contrast
    p_value: float
    verdict: str
    exact_p_value: float
    exact_verdict: str
    bases: dict[int, float]
    diverged: int


def results(rows: Sequence[Row], part: Part, method: str) -> dict[Pair, Row]:
    """Return the rows of a method by pair, at its learning rate; also those that diverged."""
    found = {}
    lr = chosen_rate(rows, part, method)
    for row in rows:
        pair = (row["base"], row["order"])
        is_result = (row["task"], row["method"]) == (part.task, method) and pair in part.pairs
        if is_result and row["lr"] == lr:
            found[pair] = row
    return found


def differences(
    rows: Sequence[Row], part: Part, names: Names, value: Callable[[Row], float] = log_loss
) -> dict[Pair, float]:
    """Return the difference of each pair that both methods have; without those of which a run diverged.

    Raises:
        GrassError: the runs of a pair began with different weights.
    """
    of_method, of_other = (results(rows, part, name) for name in names)
    found = {}
    for pair in of_method.keys() & of_other.keys():
        a, b = of_method[pair], of_other[pair]
        if a["base_digest"] != b["base_digest"]:
            raise GrassError(
                f"{names[0]} and {names[1]} began with different weights on base {pair[0]}: run the part on one machine"
            )
        if a["log_loss"] is not None and b["log_loss"] is not None:
            found[pair] = value(a) - value(b)
    return dict(sorted(found.items()))


def compare(rows: Sequence[Row], part: Part, family: Sequence[Names]) -> dict[Names, Compared]:
    """Compare pairs of methods, corrected for their number; those with fewer than `FEWEST` pairs are left out."""
    losses = {names: of for names in family if len(of := differences(rows, part, names)) >= FEWEST}
    if not losses:
        return {}
    matches = {names: differences(rows, part, names, exact) for names in losses}
    p_values, exact_p_values = corrected_p_values(losses), corrected_p_values(matches)
    found = {}
    for names, of in losses.items():
        bases = {
            int(base): mean(loss for pair, loss in of.items() if pair[0] == base)
            for base in dict.fromkeys(pair[0] for pair in of)
        }
        bases_of_pairs = [base for base, _ in of]
        loss = contrast(list(of.values()), bases_of_pairs, len(losses))
        points = contrast(list(matches[names].values()), bases_of_pairs)
        done = [results(rows, part, name).keys() for name in names]
        found[names] = Compared(
            loss,
            points,
            p_values[names],
            verdict(loss, p_values[names]),
            exact_p_values[names],
            verdict(points, exact_p_values[names], lower_is_better=False),
            bases,
            diverged=len(done[0] & done[1]) - len(of),
        )
    return found


class Summary(NamedTuple):
    """Means of a method over its pairs, and standard deviations over orders of the data, within bases.

    Attributes:
        rate: learning rate.
        runs, diverged: number of runs, and of those without a result.
        log_loss, exact: means.
        log_loss_deviation, exact_deviation: deviations within bases.
        trained_share: parameters that a step trains over those of the base model.
        longest_wait, mean_wait: largest number of steps in a row in which a layer did not train: in any run, and the
            mean over runs.
    """

    rate: float
    runs: int
    diverged: int
    log_loss: float
    log_loss_deviation: float
    exact: float
    exact_deviation: float
    trained_share: float
    longest_wait: int
    mean_wait: float


def summarize(rows: Sequence[Row], part: Part, method: str) -> Summary | None:
    """Return the summary of a method; None if it has fewer than two results."""
    everything = results(rows, part, method)
    of = {pair: row for pair, row in everything.items() if row["log_loss"] is not None}
    if len(of) < 2:
        return None

    def statistics(value: Callable[[Row], float]) -> tuple[float, float]:
        by_base: dict[int | str, list[float]] = {}
        for pair, row in of.items():
            by_base.setdefault(pair[0], []).append(value(row))
        deviations = [stdev(values) for values in by_base.values() if len(values) > 1]
        return mean(value(row) for row in of.values()), float(
            np.sqrt(np.mean(np.square(deviations or [0.0])))
        )

    return Summary(
        next(row["lr"] for row in of.values()),
        len(everything),
        len(everything) - len(of),
        *statistics(log_loss),
        *statistics(exact),
        mean(_share_of_base(row) for row in of.values()),
        max(row["longest_wait"] for row in of.values()),
        mean(row["longest_wait"] for row in of.values()),
    )


def _share_of_base(row: Row) -> float:
    """Return the parameters that a step trains over those of the base model: adapters count in rows as parameters."""
    share = float(row["trained_share"])
    return share / (1 - share) if row["method"].startswith(("lora", "dora")) else share


def has_all(rows: Sequence[Row], part: Part, method: str) -> bool:
    """Return True if a method has a result, or diverged, on every pair."""
    return len(results(rows, part, method)) == len(part.pairs)


GRASS_AGAINST: list[Names] = [("grass", other) for other in KEY if other != "grass"]
_ALTERNATIVES: list[Names] = [
    *((name, other) for name in ALTERNATIVES for other in ("uniform", "grass")),
    ("static-top", "remeasured"),
]
_CONTROLS: list[Names] = [
    ("remeasured", "remeasured-shuffled"),
    ("remeasured-shuffled", "uniform"),
    ("lowest", "uniform"),
    ("lowest", "static-top"),
]
FAMILIES: dict[str, tuple[str, list[Names]]] = {
    "key": ("key", [*GRASS_AGAINST, *_ALTERNATIVES]),
    "relations": ("relations", [*GRASS_AGAINST, *_ALTERNATIVES, *_CONTROLS]),
    "further": ("further", [("grass", "uniform"), *_ALTERNATIVES, *_CONTROLS]),
    "methods": (
        "methods",
        [
            *(("grass", other) for other in ("full", "lisa", "weight-norm", "cyclic", "badam")),
            *(("grass", other) for other in ("lora-r8", "lora-r32", "dora-r32", "galore")),
            ("lisa", "uniform"),
            ("badam", "cyclic"),
            *((name, "uniform") for name in ("cyclic", "unseen", *NEW_RULES)),
        ],
    ),
    "units": (
        "units",
        [
            ("grass-floor", "grass"),
            ("grass-inside", "uniform-inside"),
            ("grass-inside", "grass"),
            ("uniform-inside", "uniform"),
        ],
    ),
    "modules": (
        "settings",
        [("modules-grass", "modules-uniform"), ("modules-grass", "grass"), ("modules-uniform", "uniform")],
    ),
    "again": (
        "again",
        [
            *((name, "uniform") for name in ("grass", *AGAIN)),
            ("grass", "shuffled"),
            ("remeasured", "remeasured-shuffled"),
            ("remeasured", "positions"),
            ("static-top", "static-top-shuffled"),
            ("static-top", "remeasured"),
        ],
    ),
    "rules": (
        "rules",
        [(name, "uniform") for name in STUDY.parts["rules"].methods if name in RULES],
    ),
    "turns": (
        "rules",
        [(name, "unseen") for name in STUDY.parts["rules"].methods if name in RULES and name != "unseen"],
    ),
    "later-rules": ("methods", [(name, other) for name in NEW_RULES for other in ("unseen", "cyclic")]),
    "order": ("again", [(name, "cyclic") for name in ("grass", *AGAIN)]),
    "bound": ("rules", [("signal", "noisy")]),
    "controls": (
        "settings",
        [
            *(("grass", other) for other in ("uniform", "static", "shuffled", "lora-r32")),
            ("grass-inside", "lora-r32"),
            ("grass-inside", "grass"),
        ],
    ),
    "first-settings": (
        "first-settings",
        [(name, "grass") for name in STUDY.parts["first-settings"].methods if name != "grass"],
    ),
    "settings": (
        "settings",
        [(name, "grass") for name in STUDY.parts["settings"].methods if name in SETTINGS],
    ),
    "confirmation": (
        "confirmation",
        [
            (name, other)
            for name in ("grass", *CHOSEN, *SUGGESTED, *REMOVED)
            for other in ("uniform", "grass")
            if name != other
        ],
    ),
}
"""Name of a family of comparisons, which are corrected together -> part of the study, and comparisons."""

ACROSS: list[Names] = [
    *(("grass", other) for other in ("uniform", "shuffled", "static", "full")),
    ("shuffled", "uniform"),
    *(("grass", other) for other in ("galore", "lora-r32", "dora-r32", "lisa")),
    ("grass-inside", "lora-r32"),
    ("galore", "full"),
    ("lisa", "uniform"),
    *(("remeasured", other) for other in ("uniform", "grass", "remeasured-shuffled", "positions", "full")),
    ("signal-squared", "uniform"),
    *(("static-top", other) for other in ("uniform", "grass", "static-top-shuffled", "remeasured", "full")),
    *(("lowest", other) for other in ("uniform", "static-top")),
]
"""Comparisons on all bases of arithmetic."""


class Tested(NamedTuple):
    """A difference whose observations are bases.

    Attributes:
        difference: mean over the bases.
        detectable: difference that would have been decided in 80 % of such experiments.
        p_value: corrected for the number of comparisons.
        verdict: "better", "worse" or "undecided".
    """

    difference: Mean
    detectable: float
    p_value: float
    verdict: str


class Across(NamedTuple):
    """A method against another one, on all base models of arithmetic: log-loss, and exact match in points."""

    log_loss: Tested
    exact: Tested


def counted_parts(names: Names) -> list[Part]:
    """Return the parts of arithmetic that have both methods, and on whose bases no method was chosen.

    The best rules were chosen on the bases of the rules, and `SUGGESTED` on those of the confirmation, which count for
    comparisons of other methods.
    """
    chosen_on = {"rules", "confirmation"} if {*SUGGESTED} & {*names} else {"rules"}
    return [
        part
        for name, part in STUDY.parts.items()
        if part.task == "arithmetic" and {*names} <= {*part.methods} and name not in chosen_on
    ]


def across(rows: Sequence[Row]) -> dict[Names, Across]:
    """Return the comparisons of `ACROSS` on the bases of all `counted_parts`; without those on fewer than two bases."""

    def bases_of(names: Names, value: Callable[[Row], float]) -> list[float]:
        found: dict[int | str, list[float]] = {}
        for part in counted_parts(names):
            pairs = differences(rows, part, names, value)
            for (base, _), difference in pairs.items() if len(pairs) >= FEWEST else ():
                found.setdefault(base, []).append(difference)
        return [mean(values) for values in found.values()]

    def tested(value: Callable[[Row], float], sign: int) -> dict[Names, Tested]:
        values = {names: of for names in ACROSS if len(of := bases_of(names, value)) > 1}
        means = {names: mean_of(of) for names, of in values.items()}
        p_values = holm({names: of.p_value for names, of in means.items()})
        return {
            names: Tested(
                of,
                detectable(values[names], len(means)),
                p_values[names],
                "undecided" if p_values[names] > 0.05 else "better" if sign * of.mean > 0 else "worse",
            )
            for names, of in means.items()
        }

    losses, matches = tested(log_loss, -1), tested(exact, 1)
    return {names: Across(of, matches[names]) for names, of in losses.items()}


def at_uniform_rate(rows: Sequence[Row], method: str) -> tuple[list[float], list[float]]:
    """Return the differences of log-loss and exact match from uniform sampling, both at the rate of the latter.

    They are of the runs of the search, in the parts of which results are counted.
    """
    losses, points = [], []
    for part in counted_parts((method, "uniform")):
        lr = chosen_rate(rows, part, "uniform")
        of: dict[str, dict[Pair, Row]] = {method: {}, "uniform": {}}
        for row in rows:
            pair = (row["base"], row["order"])
            is_search = (
                row["task"] == part.task and row["base"] in part.bases and row["order"] in SEARCH.orders
            )
            if is_search and row["method"] in of and row["lr"] == lr and row["log_loss"] is not None:
                of[row["method"]][pair] = row
        for pair in of[method].keys() & of["uniform"].keys():
            losses.append(log_loss(of[method][pair]) - log_loss(of["uniform"][pair]))
            points.append(exact(of[method][pair]) - exact(of["uniform"][pair]))
    return losses, points


def chosen_rate(rows: Sequence[Row], part: Part, method: str) -> float | None:
    """Return the learning rate of a method in a part; None if its search is not finished."""
    return SEARCH.next_rates(rows, part.task, rate_of(method), part.bases)[0]


def rates_over_uniform(rows: Sequence[Row], method: str) -> set[float]:
    """Return the learning rates of a method over those of uniform sampling, in the parts that are counted."""
    rates = [
        (chosen_rate(rows, part, method), chosen_rate(rows, part, "uniform"))
        for part in counted_parts((method, "uniform"))
    ]
    return {of_method / of_uniform for of_method, of_uniform in rates if of_method and of_uniform}


def trained_lowest(rows: Sequence[Row], method: str) -> tuple[int, int]:
    """Return the number of runs of a method that trained the layers nearest to the input only, and of all its runs."""
    runs = [
        row
        for part in counted_parts((method, "uniform"))
        for row in results(rows, part, method).values()
        if row["log_loss"] is not None
    ]
    return sum(not any(row["layers"][ACTIVE:]) for row in runs), len(runs)


@dataclass(frozen=True)
class Found:
    """Rows of the studies, and all comparisons made from them.

    Attributes:
        rows: rows of study A with its budgets.
        families: comparisons of each family.
        across: comparisons on all bases.
        stability: rows of the stability of norms.
        folder: folder of the rows.
    """

    rows: list[Row]
    families: dict[str, dict[Names, Compared]]
    across: dict[Names, Across]
    stability: list[Row]
    folder: Path

    @classmethod
    def of(cls, folder: Path) -> "Found":
        """Read the rows of a folder, and make each comparison once."""
        rows = STUDY.matching(read_rows(folder / "study.jsonl"))
        families = {
            name: compare(rows, STUDY.parts[part], family) for name, (part, family) in FAMILIES.items()
        }
        return cls(rows, families, across(rows), read_rows(folder / "stability.jsonl"), folder)
