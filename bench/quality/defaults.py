"""The defaults of `GrassConfig`, each with the comparisons that speak for or against it."""

from collections.abc import Mapping
from typing import NamedTuple

from bench.quality.comparison import Found, chosen_rate
from bench.quality.markdown import marked, table
from bench.quality.methods import CONFIG
from bench.quality.statistics import Contrast, Mean
from bench.quality.study import STUDY
from grass import GrassConfig

OTHER_VALUES: dict[str, Mapping[str, str]] = {
    "sampler": {
        "remeasured": '"remeasured", `probe_steps` 0, `temperature` 0.5, `ema` 1.0',
        "static-top": '"static", `temperature` 0.01',
        "uniform": '"uniform"',
        "static": '"static"',
        "cyclic": '"cyclic"',
        "weight-norm": '"weight_norm"',
    },
    "probe_steps": {"probe-0": "0", "probe-5": "5"},
    "sample_interval": {
        "period-5": "5",
        "period-20": "20",
        "period-25": "25, `update_interval` 100",
        "period-40": "40, `update_interval` 40",
    },
    "update_interval": {"window-10": "10", "window-80": "80"},
    "temperature": {"tau-0.25": "0.25", "tau-0.5": "0.5", "tau-2": "2.0"},
    "ema": {"ema-0.1": "0.1", "ema-1": "1.0"},
    "importance_scale": {"scale-mean": "mean", "scale-zscore": "zscore", "scale-none": "none"},
    "min_probability": {"grass-floor": "0.0625"},
    "always_active": {"grass-inside": "none"},
    "moments": {"reset": "reset"},
    "draw_ahead": {"ahead-0": "0", "ahead-5": "5"},
    "active_layers": {"active-1": "1", "active-4": "4"},
}
"""Option -> method that has another value, and that value."""

_HEAD = """\
## Defaults

Log-loss of other values minus that of GRASS. Runs are short, so *here* GRASS has other intervals than by default.
`sampler`: on all bases, "cyclic" and "weight_norm" on four, each at the rate of its own search. The others: on four
bases, at {rate}, and `min_probability` and `always_active` on four others, at rates of their own.
"""
_CONCLUSION = """\
## Defaults

[Each default and other values](evidence-tables.md#defaults) were compared by log-loss. {decided} The others are
undecided. Defaults stay all the same, since these are small models of one kind; all values are
[options](optimizers.md#grassgrassadamw). `offload`, buffers and `fused_backward` do not change what is trained.
"""


class _Alternative(NamedTuple):
    """A value in place of the default, compared with GRASS.

    Attributes:
        verdict: "better", "worse" or "undecided", by log-loss.
        difference: of log-loss, nats.
        detectable: difference that would have been decided in 80 % of such experiments.
    """

    verdict: str
    difference: Contrast | Mean
    detectable: float


def _found_of(found: Found, method: str) -> _Alternative | None:
    """Return what was found of a method against GRASS, first on all bases; None if it was not run."""
    ours, theirs = (method, "grass"), ("grass", method)
    for names in (ours, theirs):
        if of := found.across.get(names):
            alternative = _Alternative(of.log_loss.verdict, of.log_loss.difference, of.log_loss.detectable)
            return alternative if names == ours else _reversed(alternative)
    for family in ("settings", "units", "methods"):
        for names in (ours, theirs):
            if pairs := found.families[family].get(names):
                alternative = _Alternative(pairs.verdict, pairs.log_loss, pairs.log_loss.detectable)
                return alternative if names == ours else _reversed(alternative)
    return None


def _reversed(of: _Alternative) -> _Alternative:
    """Return what was found of GRASS against a method as that of the method against GRASS."""
    difference = of.difference._replace(
        mean=-of.difference.mean, low=-of.difference.high, high=-of.difference.low
    )
    verdict = {"better": "worse", "worse": "better"}.get(of.verdict, of.verdict)
    return _Alternative(verdict, difference, of.detectable)


def defaults(found: Found) -> str:
    """Return the defaults as a table, with what was found of other values."""
    lines = []
    for option, values in OTHER_VALUES.items():
        default, here = getattr(GrassConfig(), option), getattr(CONFIG, option)
        shown = f"{default}" if default == here else f"{default} ({here} here)"
        texts = []
        for method, value in values.items():
            of = _found_of(found, method)
            texts.append(f"{value}: " + ("not run" if of is None else _text(of)))
        lines.append([f"`{option}`", shown, "; ".join(texts)])
    rate = chosen_rate(found.rows, STUDY.parts["settings"], "grass")
    head = _HEAD.format(rate="GRASS's rate" if rate is None else f"GRASS's rate, {rate:g}")
    rows = table(["option", "default", "other values"], lines, text_columns=range(3))
    return f"{head}\n{rows}\n\n{_power(found)}"


def conclusion(found: Found) -> str:
    """Return which values are better and worse than a default, for the page that has no table of them."""
    texts = []
    for wanted in ("better", "worse"):
        names = [
            f"`{option}` {value}"
            for option, values in OTHER_VALUES.items()
            for method, value in values.items()
            if (of := _found_of(found, method)) and of.verdict == wanted
        ]
        texts.append(f"{wanted.capitalize()} than the default: {'; '.join(names) or 'none'}.")
    return _CONCLUSION.format(decided=" ".join(texts))


def _text(of: _Alternative) -> str:
    """Return a difference, with its verdict if it was decided."""
    return marked(of.verdict, of.difference) + (f" {of.verdict}" if of.verdict != "undecided" else "")


def _power(found: Found) -> str:
    """Return how large the differences were that could not be decided."""
    least = [
        of.detectable
        for values in OTHER_VALUES.values()
        for method in values
        if (of := _found_of(found, method)) and of.verdict == "undecided"
    ]
    if not least:
        return ""
    return (
        "Values without a verdict are undecided: differences below "
        f"{min(least):.2f} to {max(least):.2f} nats could not be decided.\n"
    )
