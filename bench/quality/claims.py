"""The claims of the paper, and the doubts of its reviewers, with what the stored rows say of them."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations, product

from scipy import stats

from bench.quality import stability
from bench.quality.comparison import Compared, Found, Names, summarize
from bench.quality.figures import MEMORY
from bench.quality.markdown import marked, table
from bench.quality.methods import BLIND
from bench.quality.study import BUDGETS, CHOSEN, STUDY
from grass.finetune.run_folder import read_rows

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
    "GRASS is better than LoRA (by up to 4.38 points) and DoRA": (
        "better",
        [
            ("bases", ("grass", "lora-r32"), ""),
            ("bases", ("grass", "dora-r32"), ""),
        ],
    ),
    "The same with embedding, head and norms frozen in both": (
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
    "An interval of 25 to 50 steps is best and 5 is poor (here against 10)": (
        "worse",
        [("settings", (f"period-{n}", "grass"), "") for n in (5, 20, 25, 40)],
    ),
}
"""Claim of the paper, or doubt of its reviewers -> the verdict on the first comparison that is for it; comparisons."""


def _answers(found: Found, place: str, names: Names) -> tuple[tuple[str, str], tuple[str, str]] | None:
    """Return verdict and difference by log-loss, and both by exact match; None if the comparison was not run."""
    if place == "bases":
        of = found.across.get(names)
        return of and (
            (of.log_loss.verdict, marked(of.log_loss.verdict, of.log_loss.difference)),
            (of.exact.verdict, marked(of.exact.verdict, of.exact.difference, 1)),
        )
    compared = found.families[place].get(names)
    return compared and (
        (compared.verdict, marked(compared.verdict, compared.log_loss)),
        (compared.exact_verdict, marked(compared.exact_verdict, compared.exact, 1)),
    )


def claims(found: Found) -> str:
    """Return each claim of the paper, and each doubt of its reviewers, with what the first comparison answers."""
    lines = []
    for claim, (supporting, places) in CLAIMS.items():
        place, (a, b), _ = places[0]
        of = _answers(found, place, (a, b))
        answers = [
            f"{verdict if verdict == 'undecided' else 'for' if verdict == supporting else 'against'}: {difference}"
            for verdict, difference in of or ()
        ]
        part = "" if place == "bases" else f" ({place})"
        lines.append([claim, f"`{a}` - `{b}`{part}", *(answers or ["not run", "not run"])])
    others = "\n".join(f"- **{claim}** {text}" for claim, text in findings(found).items())
    header = ["claim of the paper, or doubt", "comparison", "by log-loss, nats", "by exact match, points"]
    return f"## The paper's claims\n\n{table(header, lines, text_columns=range(4))}\n\n{others}\n"


def comparisons_of_claims(found: Found) -> str:
    """Return all comparisons that belong to a claim, with their verdicts."""
    lines = []
    for claim, (_, places) in CLAIMS.items():
        texts = []
        for place, (a, b), note in places:
            notes = [text for text in (note, place if place != "bases" else "") if text]
            title = f"`{a}` - `{b}`" + (f" ({'; '.join(notes)})" if notes else "")
            verdicts = [verdict for verdict, _ in _answers(found, place, (a, b)) or [("not run", "")]]
            texts.append(f"{title}: {' / '.join(dict.fromkeys(verdicts))}")
        lines.append([claim, "; ".join(texts)])
    return f"{_COMPARISONS}\n{table(['claim of the paper, or doubt', 'comparisons'], lines, range(2))}\n"


def findings(found: Found) -> dict[str, str]:
    """Return the result for each claim of the paper, and doubt of its reviewers, that is no comparison."""
    key = STUDY.parts["key"]
    spread = summarize(found.rows, key, "grass")
    seeing = {
        other: {
            names: of
            for names, of in found.families[family].items()
            if names[0] not in (*BLIND, "signal-inverse")
        }
        for family, other in (("rules", "uniform sampling"), ("turns", "`unseen`"))
    }
    again = {
        names: of
        for names, of in found.families["confirmation"].items()
        if names[0] in CHOSEN and names[1] == "uniform"
    }
    waits = [
        f"`{name}` {of.longest_wait}"
        for name in ("uniform", "grass", "static", "remeasured", "static-top")
        if (of := summarize(found.rows, key, name))
    ]
    return {
        "Doubt: does any rule beat sampling without norms?": "[Rules](evidence-log.md) that see all gradients, "
        + "; ".join(f"against {other} {_counts(of)}" for other, of in seeing.items())
        + f". Those chosen to run again on other bases, against uniform sampling {_counts(again)}. Methods of the part "
        f"`again`, against `cyclic` {_counts(found.families['order'])}. The others are undecided.",
        "Doubt: some layers starve.": "not run yet."
        if not waits
        else f"Longest wait of a layer in any run of the key contrast, of {BUDGETS[key.task].steps} steps: "
        f"{', '.join(waits)}.",
        "Doubt: the norm of a batch is noise.": _noise(found),
        "Paper: which layers have large norms differs between tasks, and changes during training.": _order(
            found
        ),
        "Paper: the deviation over seeds is 0.12 points.": "not run yet."
        if spread is None
        else f"Here {spread.exact_deviation:.1f} points over orders of the data, within a base model.",
        "Paper: peak memory is up to 19.97 % lower; at 1,792 tokens LoRA and DoRA pass 24 GB, GRASS does not; "
        "offloading cuts the growth in memory from 1.63 to 0.14 GB.": _memory(found),
        "Paper: overlap gives 1.08x throughput; norms cost 2 to 6 %.": "Unmeasured ([Performance](performance.md)); "
        "the overlap is [simulated](evidence/timeline.png).",
    }


def _counts(found: Mapping[Names, Compared]) -> str:
    """Return how many methods are better and worse than another one, with the names of the better ones."""
    if not found:
        return "not run yet"
    texts = []
    for measure, place in (("log-loss", "verdict"), ("exact match", "exact_verdict")):
        verdicts = [getattr(of, place) for of in found.values()]
        names = [f"`{name}`" for (name, _), of in found.items() if getattr(of, place) == "better"]
        better = f"{len(names)} better" + (f" ({', '.join(names)})" if names else "")
        texts.append(f"by {measure} {better}, {verdicts.count('worse')} worse")
    least = [of.log_loss.detectable for of in found.values() if of.verdict == "undecided"]
    power = f" (detectable: {max(least):.2f} nats)" if least else ""
    return f"of {len(found)} {' and '.join(texts)}{power}"


def _noise(found: Found) -> str:
    """Return how noisy the norms of batches are."""
    if not found.stability:
        return "not run yet."
    steps = sorted({row["step"] for row in found.stability if row["kind"] == "norms"})
    repeated = [stability.repeatability(found.stability, 16, step, 1) for step in steps]
    shares = [stability.noise_share(found.stability, 16, step) for step in steps]
    agreeing = ", ".join(f"{stability.agreement(found.stability, 16, step, 20):.2f}" for step in steps)
    return (
        f"Of the squared norm of a batch of 16 problems {100 * min(shares):.0f} to {100 * max(shares):.0f} % is noise. "
        f"The rank correlation of layers is {min(repeated):.2f} to {max(repeated):.2f} between two batches; of a mean "
        f"over 20 steps with the gradient of {stability.REFERENCE:,} problems it is {agreeing} at the start, half way "
        "and at the end."
    )


def _order(found: Found) -> str:
    """Return how much alike the layers are ordered in tasks and stages."""
    if not found.stability:
        return "not run yet."
    steps = sorted({row["step"] for row in found.stability if row["kind"] == "norms"})
    correlation = stability.drift(found.stability, 16, steps[0], steps[-1])
    here = (
        f"Rank correlation of the layers: on the small models, trained by GRASS, {correlation:+.2f} from the first "
        "step to the last."
    )
    return here + _norms(found)


def _norms(found: Found) -> str:
    """Return how much alike the layers of the real model are ordered in its tasks and stages."""
    panels: dict[str, list[list[float]]] = {}
    for row in read_rows(found.folder / "norms.jsonl"):
        panels.setdefault(row["panel"], []).append(row["norms"])
    if not panels:
        return ""

    def correlations(pairs: Iterable[tuple[list[float], list[float]]]) -> str:
        values = [float(stats.spearmanr(a, b).statistic) for a, b in pairs]
        return f"{min(values):+.2f} to {max(values):+.2f}"

    texts = []
    for panel, norms in panels.items():
        of = "stages of training by uniform sampling" if "training" in panel else f"{panel} tasks"
        texts.append(f"{correlations(combinations(norms, 2))} between two of {len(norms)} {of}")
    if {"arithmetic", "commonsense"} <= panels.keys():
        both = correlations(product(panels["arithmetic"], panels["commonsense"]))
        texts.append(f"{both} between one of arithmetic and one of commonsense")
    return f" On SmolLM2: {', '.join(texts)}."


def _memory(found: Found) -> str:
    """Return predicted peaks at the paper's longest texts."""
    peaks = {row["method"]: row["peak_gib"] for row in read_rows(found.folder / MEMORY)}
    titles = {
        "full": "full",
        "lisa": "LISA",
        "lora-r128": "LoRA of rank 128",
        "grass": '`offload="none"`',
        "grass-resident": '`"resident"`',
        "grass-streamed": '`"streamed"`',
    }
    shown = ", ".join(f"{title} {peaks[name]:.1f}" for name, title in titles.items() if name in peaks)
    below = [title for name, title in titles.items() if name in peaks and peaks[name] * 2**30 < 24e9]
    return (
        "Nothing is measured. The planner predicts for LLaMA2-7B, 4 texts of 1,792 tokens, activation checkpointing, "
        f"in GiB: {shown}; `full`, LISA and LoRA with moments in bfloat16, GRASS with moments and master weights in "
        f"float32 ([all methods and lengths](evidence/memory.png)). Below 24 GB: {', '.join(below) or 'none'}. DoRA "
        "and the growth are not predicted."
        if shown
        else "not predicted yet."
    )
