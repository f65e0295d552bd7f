"""Numbers and tables as Markdown."""

from collections.abc import Iterable, Sequence
from statistics import mean

from bench.quality.statistics import Contrast, Mean


def table(header: Sequence[str], lines: Iterable[Sequence[str]], text_columns: Sequence[int] = (0,)) -> str:
    """Return a table of Markdown; numbers are in all columns but those of text."""
    rows = [header, ["---" if i in text_columns else "---:" for i in range(len(header))], *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def interval(found: Contrast | Mean, digits: int = 3) -> str:
    """Return a difference with its interval."""
    return f"{found.mean:+.{digits}f} [{found.low:+.{digits}f}, {found.high:+.{digits}f}]"


def marked(verdict: str, found: Contrast | Mean, digits: int = 3) -> str:
    """Return a difference with its interval, marked if that excludes 0 and the verdict is undecided all the same."""
    mark = r"\*" if verdict == "undecided" and found.low * found.high > 0 else ""
    return interval(found, digits) + mark


def p_text(p_value: float) -> str:
    """Return a p-value as text."""
    return "< 0.001" if p_value < 0.001 else f"{p_value:.3f}"


def mean_and_range(values: Sequence[float], digits: int = 3) -> str:
    """Return the mean with the range."""
    return f"{mean(values):+.{digits}f} ({min(values):+.{digits}f} to {max(values):+.{digits}f})"


def means_and_ranges(pairs: Sequence[tuple[float, float]] | None) -> tuple[str, str]:
    """Return differences of log-loss and of accuracy as text; empty if there are none."""
    if not pairs:
        return "", ""
    losses, points = zip(*pairs, strict=True)
    return mean_and_range(losses, 4), mean_and_range(points, 1)
