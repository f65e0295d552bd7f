"""The claims of the paper, and the doubts of its reviewers, with what the stored rows say of them."""

from collections.abc import Mapping, Sequence
from itertools import combinations, product
from typing import NamedTuple

from scipy import stats

from bench.quality import real, stability
from bench.quality.comparison import FAMILIES, MEMORY, NORMS, PAPER_GB, Compared, Found, Names, summarize
from bench.quality.markdown import marked, table
from bench.quality.methods import BLIND
from bench.quality.study import BUDGETS, CHOSEN, STUDY
from grass.finetune.run_folder import read_rows

_WORDS = """\
*For* and *against* refer to the sentence of the first column.
"""

_COMPARISONS = """\
## Claims and their comparisons

Verdicts by log-loss / by exact match, one if they are the same. [Evidence](evidence.md#the-papers-claims) answers a
claim by the first one. Those without brackets are of all bases; the others are of a part of the study.
"""

Place = tuple[str, Names, str]
"""Family of a comparison, or "bases" for the table on all bases; methods; note, may be empty."""

CLAIMS: dict[str, tuple[str, Sequence[Place]]] = {
    "Sampling by gradient norms is better than uniform sampling (LISA)": (
        "better",
        [("bases", ("grass", "uniform"), ""), ("relations", ("grass", "uniform"), "")],
    ),
    "Doubt: the same probabilities would do as well on other layers": (
        "worse",
        [("bases", ("grass", "shuffled"), ""), ("relations", ("grass", "shuffled"), "")],
    ),
    "Adapting during training is better than the probe alone": (
        "better",
        [("bases", ("grass", "static"), ""), ("relations", ("grass", "static"), "")],
    ),
    "GRASS is close to full fine-tuning, or better": (
        "better",
        [("bases", ("grass", "full"), ""), ("relations", ("grass", "full"), "")],
    ),
    "GRASS is better than LoRA (by up to 4.38 points)": (
        "better",
        [("bases", ("grass", "lora-r32"), "")],
    ),
    "GRASS is better than DoRA": ("better", [("bases", ("grass", "dora-r32"), "")]),
    "GRASS is better than LoRA with embedding, head and final norm frozen in both": (
        "better",
        [("bases", ("grass-inside", "lora-r32"), "")],
    ),
    "GRASS is better than LISA, whose moments restart in the paper and are kept in its code (`uniform`)": (
        "better",
        [("bases", ("grass", "lisa"), ""), ("bases", ("lisa", "uniform"), "the restart alone")],
    ),
    "Doubt: layers trained as often without norms would do as well as norms of all layers in each period": (
        "worse",
        [
            ("bases", ("remeasured", "positions"), ""),
            ("bases", ("remeasured", "remeasured-shuffled"), ""),
            ("bases", ("remeasured", "uniform"), ""),
            ("relations", ("remeasured", "remeasured-shuffled"), ""),
            ("relations", ("remeasured", "uniform"), ""),
            ("order", ("positions", "cyclic"), "the shares without norms against layers in order"),
        ],
    ),
    "Sampling is needed: without it some layers are never trained": (
        "worse",
        [
            ("bases", ("static-top", "uniform"), ""),
            ("bases", ("static-top", "static-top-shuffled"), ""),
            ("bases", ("lowest", "uniform"), ""),
            ("relations", ("static-top", "uniform"), ""),
            ("relations", ("lowest", "uniform"), ""),
            ("confirmation", ("signal-top", "uniform"), "the largest norms in each period"),
        ],
    ),
    "An interval of 25 to 50 steps is best (25 here, and `update_interval` 100, against 10 and 20)": (
        "better",
        [("settings", (f"period-{n}", "grass"), "") for n in (25, 40, 20)],
    ),
    "An interval of 5 steps is poor (here against 10)": (
        "worse",
        [("settings", ("period-5", "grass"), "")],
    ),
}
"""Claim of the paper, or doubt of its reviewers -> the verdict on the first comparison that is for it; comparisons."""


class _Answers(NamedTuple):
    """Verdicts on a comparison with its differences, by log-loss and by exact match; and its number of observations."""

    log_loss: tuple[str, str]
    exact: tuple[str, str]
    size: int


def _answers(found: Found, place: str, names: Names) -> _Answers | None:
    """Return what a comparison answers; None if it was not run."""
    if place == "bases":
        of = found.across.get(names)
        return of and _Answers(
            (of.log_loss.verdict, marked(of.log_loss.verdict, of.log_loss.difference)),
            (of.exact.verdict, marked(of.exact.verdict, of.exact.difference, 1)),
            of.log_loss.difference.size,
        )
    compared = found.families[place].get(names)
    return compared and _Answers(
        (compared.verdict, marked(compared.verdict, compared.log_loss)),
        (compared.exact_verdict, marked(compared.exact_verdict, compared.exact, 1)),
        compared.log_loss.num_pairs,
    )


def claims(found: Found) -> str:
    """Return each claim of the paper, and each doubt of its reviewers, with what the first comparison answers."""
    lines = []
    for claim, (supporting, places) in CLAIMS.items():
        place, (a, b), _ = places[0]
        of = _answers(found, place, (a, b))
        if of is None:
            lines.append([claim, f"`{a}` - `{b}`", "not run", "not run"])
            continue
        answers = [
            f"{verdict if verdict == 'undecided' else 'for' if verdict == supporting else 'against'}: {difference}"
            for verdict, difference in (of.log_loss, of.exact)
        ]
        size = (
            f"{of.size} bases" if place == "bases" else f"{of.size} pairs of the part `{FAMILIES[place][0]}`"
        )
        lines.append([claim, f"`{a}` - `{b}`, {size}", *answers])
    others = "\n".join(f"- **{claim}** {text}" for claim, text in findings(found).items())
    header = ["claim of the paper, or doubt", "comparison", "by log-loss, nats", "by exact match, points"]
    return f"## The paper's claims\n\n{_WORDS}\n{table(header, lines, text_columns=range(4))}\n\n{others}\n"


def comparisons_of_claims(found: Found) -> str:
    """Return all comparisons that belong to a claim, with their verdicts."""
    lines = []
    for claim, (_, places) in CLAIMS.items():
        texts = []
        for place, (a, b), note in places:
            notes = [text for text in (note, "" if place == "bases" else FAMILIES[place][0]) if text]
            title = f"`{a}` - `{b}`" + (f" ({'; '.join(notes)})" if notes else "")
            of = _answers(found, place, (a, b))
            verdicts = "not run" if of is None else " / ".join(dict.fromkeys((of.log_loss[0], of.exact[0])))
            texts.append(f"{title}: {verdicts}")
        lines.append([claim, "; ".join(texts)])
    return f"{_COMPARISONS}\n{table(['claim of the paper, or doubt', 'comparisons'], lines, range(2))}\n"


def findings(found: Found) -> dict[str, str]:
    """Return the result for each claim of the paper, and doubt of its reviewers, that is no comparison."""
    return {
        "Doubt: no rule beats sampling without norms.": _rules(found),
        "Doubt: some layers starve.": _starvation(found),
        "Doubt: the norm of a batch is noise.": _noise(found),
        "Which layers have large norms changes during training, and differs between tasks.": _order(found),
        "The deviation over seeds is 0.12 points.": _deviation(found),
        "At 1,792 tokens LoRA and DoRA need more than 24 GB, and GRASS does not.": _memory(found),
        "Peak memory is up to 19.97 % lower; offloading cuts its growth from 1.63 to 0.14 GB; overlap gives 1.08x "
        "throughput; norms cost 2 to 6 %.": "Unmeasured ([performance](performance.md)).",
    }


NOT_RUN = "Not run yet."


def _answer(supported: bool) -> str:
    return "For" if supported else "Against"


def _rules(found: Found) -> str:
    """Return which rules are better than methods that see no norms."""

    def chosen(family: str, *, blind: bool = False) -> dict[Names, Compared]:
        return {
            names: compared
            for names, compared in found.families[family].items()
            if (names[0] in BLIND or names[0].endswith("-shuffled")) == blind and names[0] != "signal-inverse"
        }

    again = {
        names: of
        for names, of in chosen("confirmation").items()
        if names[0] in CHOSEN and names[1] == "uniform"
    }
    later = {names: of for names, of in chosen("later-rules").items() if names[1] == "cyclic"}
    return (
        f"[Rules](evidence-log.md) that see all gradients, better than uniform sampling: {_better(chosen('rules'))}; "
        f"the best of them on other bases: {_better(again)}; better than `unseen`, longest unseen first: "
        f"{_better(chosen('turns'))}. Better than `cyclic`, in order: of later rules {_better(later)}, of the methods "
        f"of `again` that follow norms {_better(chosen('order'))}, and of those that do not "
        f"{_better(chosen('order', blind=True))}."
    )


def _better(found: Mapping[Names, Compared]) -> str:
    """Return how many methods are better than another one by both measures, with their names."""
    if not found:
        return "not run yet"
    texts = []
    for measure, place in (("log-loss", "verdict"), ("exact match", "exact_verdict")):
        names = [f"`{name}`" for (name, _), of in found.items() if getattr(of, place) == "better"]
        texts.append(
            f"{len(names)} of {len(found)} by {measure}" + (f" ({', '.join(names)})" if names else "")
        )
    return " and ".join(texts)


def _starvation(found: Found) -> str:
    """Return how long layers wait in the key contrast; GRASS starves them if they wait longer than by chance."""
    key = STUDY.parts["key"]
    waits = {
        name: of
        for name in ("uniform", "grass", "static", "remeasured", "static-top")
        if (of := summarize(found.rows, key, name))
    }
    if not {"uniform", "grass"} <= waits.keys():
        return NOT_RUN
    longest = ", ".join(f"`{name}` {of.mean_wait:.0f} ({of.longest_wait})" for name, of in waits.items())
    return (
        f"{_answer(waits['grass'].mean_wait > waits['uniform'].mean_wait)}, if compared with uniform sampling: the "
        f"longest wait of a layer in a run of the key contrast, of {BUDGETS[key.task].steps} steps, a mean over runs "
        f"and the largest: {longest}."
    )


def _deviation(found: Found) -> str:
    """Return the deviation over orders of the data."""
    spread = summarize(found.rows, STUDY.parts["key"], "grass")
    texts = [] if spread is None else [f"{spread.exact_deviation:.1f} points within a base"]
    for name in real.TASKS:
        of = real.report_of(found.folder, name).methods.get("grass")
        if of and of["accuracy_deviation"] is not None:
            texts.append(f"{100 * of['accuracy_deviation']:.1f} on SmolLM2 and {name}")
    return f"Here over orders of the data: {', '.join(texts)}." if texts else NOT_RUN


ALIKE = 0.7
"""Rank correlation from which two orders of the layers are called alike."""


def _noise(found: Found) -> str:
    """Return how noisy the norms of batches are."""
    if not found.stability:
        return NOT_RUN
    steps = sorted({row["step"] for row in found.stability if row["kind"] == "norms"})
    repeated = [stability.repeatability(found.stability, 16, step, 1) for step in steps]
    shares = [stability.noise_share(found.stability, 16, step) for step in steps]
    agreeing = ", ".join(f"{stability.agreement(found.stability, 16, step, 20):.2f}" for step in steps)
    return (
        f"{_answer(max(shares) > 0.5)} as to its size: {100 * min(shares):.0f} to {100 * max(shares):.0f} % of the "
        f"squared norm of 16 problems is noise. {_answer(min(repeated) < ALIKE)} as to the order of layers: their rank "
        f"correlation is {min(repeated):.2f} to {max(repeated):.2f} between two batches (alike from {ALIKE}), "
        f"and of a mean over 20 steps with the gradient of {stability.REFERENCE:,} problems {agreeing} at the start, "
        "half way and at the end."
    )


def _order(found: Found) -> str:
    """Return how much alike the layers are ordered in tasks and stages."""
    texts = []
    if found.stability:
        steps = sorted({row["step"] for row in found.stability if row["kind"] == "norms"})
        correlation = stability.drift(found.stability, 16, steps[0], steps[-1])
        texts.append(
            f"{_answer(correlation < ALIKE)}, on the small models: rank correlation of the layers from the first step "
            f"to the last {correlation:+.2f} (alike from {ALIKE})."
        )
    return " ".join([*texts, *_norms(found)]) or NOT_RUN


def _norms(found: Found) -> list[str]:
    """Return how much alike the layers of the real model are ordered in its tasks and stages."""
    panels: dict[str, list[list[float]]] = {}
    for row in read_rows(found.folder / NORMS):
        panels.setdefault(row["panel"], []).append(row["norms"])
    pairs: dict[str, list[tuple[list[float], list[float]]]] = {}
    for panel, norms in panels.items():
        of = "stages of training by uniform sampling" if "training" in panel else f"{panel} tasks"
        pairs[f"between two of {len(norms)} {of}"] = list(combinations(norms, 2))
    if {"arithmetic", "commonsense"} <= panels.keys():
        both = list(product(panels["arithmetic"], panels["commonsense"]))
        pairs["between one of arithmetic and one of commonsense"] = both
    if not pairs:
        return []
    values = {
        title: [float(stats.spearmanr(a, b).statistic) for a, b in of] for title, of in pairs.items() if of
    }
    lowest = min(map(min, values.values()))
    ranges = ", ".join(f"{min(of):+.2f} to {max(of):+.2f} {title}" for title, of in values.items())
    return [f"{_answer(lowest < ALIKE)}, on SmolLM2-135M-Instruct: {ranges}."]


def _memory(found: Found) -> str:
    """Return predicted peaks at the paper's longest texts."""
    limit = PAPER_GB * 1e9 / 2**30
    peaks = {row["method"]: row["peak_gib"] for row in read_rows(found.folder / MEMORY)}
    titles = {
        "full": "full",
        "lisa": "LISA",
        "lora-r128": "LoRA of rank 128",
        "grass": 'GRASS with `offload="none"`',
        "grass-resident": 'with `"resident"`',
        "grass-streamed": 'with `"streamed"`',
    }
    if not titles.keys() <= peaks.keys():
        return "Not predicted yet."
    shown = ", ".join(f"{title} {peaks[name]:.1f}" for name, title in titles.items())
    supported = (
        peaks["lora-r128"] > limit > max(peak for name, peak in peaks.items() if name.startswith("grass"))
    )
    return (
        f"{_answer(supported)}, by prediction for LLaMA2-7B and 4 texts, in GiB ({PAPER_GB} GB are {limit:.1f}): "
        f"{shown}. GRASS has moments and master weights in float32, the others moments in bfloat16. DoRA is not "
        "predicted."
    )
