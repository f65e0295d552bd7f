"""Comparisons of methods in the stored rows of study A."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import mean, stdev
from typing import NamedTuple

from bench.quality.statistics import Contrast, contrast, holm, verdict
from bench.quality.study import SEARCH, Part, rate_of
from grass.errors import GrassError
from grass.reproduce.study import Pair, Row

Value = Callable[[Row], float]


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
        bases: mean difference of log-loss of each base model.
    """

    log_loss: Contrast
    exact: Contrast
    p_value: float
    verdict: str
    bases: dict[int, float]


def rate(rows: Sequence[Row], part: Part, method: str) -> float | None:
    """Return the learning rate of a method; None if its search is not finished."""
    return SEARCH.next_rates(rows, part.task, rate_of(method))[0]


def results(rows: Sequence[Row], part: Part, method: str) -> dict[Pair, Row]:
    """Return the rows of a method at its learning rate, by pair. Runs that diverged are left out."""
    lr = rate(rows, part, method)
    found = {}
    for row in rows:
        if (row["task"], row["method"], row["lr"]) == (part.task, method, lr):
            pair = (row["base"], row["order"])
            if pair in part.pairs and row["log_loss"] is not None:
                found[pair] = row
    return found


def compare(rows: Sequence[Row], part: Part, method: str, other: str) -> Compared | None:
    """Compare two methods by the pairs that both have; not yet corrected for many comparisons.

    Returns:
        None with fewer than two pairs.

    Raises:
        GrassError: the runs of a pair began with different weights.
    """
    of_method, of_other = results(rows, part, method), results(rows, part, other)
    pairs = [pair for pair in of_method if pair in of_other]
    for pair in pairs:
        if of_method[pair]["base_digest"] != of_other[pair]["base_digest"]:
            raise GrassError(
                f"{method} and {other} began with different weights on base {pair[0]}: run the part on one machine"
            )
    if len(pairs) < 2:
        return None

    def differences(value: Value) -> list[float]:
        return [value(of_method[pair]) - value(of_other[pair]) for pair in pairs]

    losses = differences(log_loss)
    found = contrast(losses)
    bases = {
        int(base): mean(loss for loss, pair in zip(losses, pairs, strict=True) if pair[0] == base)
        for base in dict.fromkeys(pair[0] for pair in pairs)
    }
    return Compared(found, contrast(differences(exact)), found.p_value, verdict(found, found.p_value), bases)


def compare_all(
    rows: Sequence[Row], part: Part, pairs: Iterable[tuple[str, str]]
) -> dict[tuple[str, str], Compared]:
    """Compare pairs of methods, with p-values corrected for the number of comparisons (Holm)."""
    found = {names: of for names in pairs if (of := compare(rows, part, *names)) is not None}
    corrected = holm({f"{a} {b}": of.p_value for (a, b), of in found.items()})
    return {
        names: of._replace(
            p_value=corrected[" ".join(names)], verdict=verdict(of.log_loss, corrected[" ".join(names)])
        )
        for names, of in found.items()
    }


class Summary(NamedTuple):
    """Mean and standard deviation of a method over its pairs."""

    lr: float
    runs: int
    log_loss: float
    log_loss_deviation: float
    exact: float
    exact_deviation: float
    trained_share: float
    longest_wait: int


def summarize(rows: Sequence[Row], part: Part, method: str) -> Summary | None:
    """Return the summary of a method; None with fewer than two runs."""
    of = list(results(rows, part, method).values())
    lr = rate(rows, part, method)
    if lr is None or len(of) < 2:
        return None
    losses, exacts = [log_loss(row) for row in of], [exact(row) for row in of]
    return Summary(
        lr,
        len(of),
        mean(losses),
        stdev(losses),
        mean(exacts),
        stdev(exacts),
        mean(row["trained_share"] for row in of),
        max(row["longest_wait"] for row in of),
    )


def is_complete(rows: Sequence[Row], part: Part, methods: Mapping[str, object] | Sequence[str]) -> bool:
    """Return True if every method has all of its pairs."""
    return all(len(results(rows, part, method)) == len(part.pairs) for method in methods)
