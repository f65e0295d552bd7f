"""The claims of the paper, and the doubts of its reviewers, with what the stored rows say of them."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations, product

from scipy import stats

from bench.quality import stability
from bench.quality.comparison import Compared, Found, Names, summarize
from bench.quality.figures import MEMORY
from bench.quality.methods import BLIND
from bench.quality.study import BUDGETS, CHOSEN, STUDY
from bench.quality.tables import COLUMNS, VERDICTS, line, table
from grass.finetune.run_folder import read_rows

_WORDS = """\
The table above counts: it generalizes to new base models. This one does not: each pair of runs, on a base with an order
of the data, is an observation of a test for these bases only, two to four of them (max t, corrected within the part).
So a comparison can be *better* here and *undecided* above. *Better* and *worse* mean that p is below 0.05, the
bootstrap interval excludes 0, and all bases agree on the sign (*bases* says how many do). In brackets is the part of
the study, if it is not the key contrast. *For* and *against*: what the first comparison says of the claim.
"""

CLAIMS: dict[str, tuple[str, Sequence[tuple[str, Names, str]]]] = {
    "Sampling by gradient norms is better than uniform sampling (LISA)": (
        "better",
        [("key", ("grass", "uniform"), ""), ("relations", ("grass", "uniform"), "")],
    ),
    "Doubt: the same probabilities would do as well without the norms": (
        "worse",
        [("key", ("grass", "shuffled"), ""), ("relations", ("grass", "shuffled"), "")],
    ),
    "Adapting during training is better than the probe alone": (
        "better",
        [("key", ("grass", "static"), ""), ("relations", ("grass", "static"), "")],
    ),
    "GRASS is close to full fine-tuning, or better": (
        "better",
        [("key", ("grass", "full"), ""), ("relations", ("grass", "full"), "")],
    ),
    "GRASS is better than LoRA (by up to 4.38 points) and DoRA; here neither trains embedding, head and norms": (
        "better",
        [
            ("methods", ("grass", "lora-r32"), ""),
            ("methods", ("grass", "dora-r32"), ""),
            ("units", ("grass-inside", "grass"), "GRASS that does not train them either"),
        ],
    ),
    "GRASS is better than LISA as published, whose moments restart": (
        "better",
        [("methods", ("grass", "lisa"), "")],
    ),
    "Norms of this moment, of all layers, are better than uniform sampling": (
        "better",
        [
            ("key", ("remeasured", "uniform"), ""),
            ("further", ("remeasured", "uniform"), ""),
            ("relations", ("remeasured", "uniform"), ""),
            ("further", ("remeasured", "remeasured-shuffled"), ""),
            ("again", ("remeasured", "remeasured-shuffled"), ""),
            ("relations", ("remeasured", "remeasured-shuffled"), ""),
            ("again", ("remeasured", "positions"), ""),
        ],
    ),
    "Sampling is needed: without it some layers are never trained": (
        "worse",
        [
            ("key", ("static-top", "uniform"), ""),
            ("relations", ("static-top", "uniform"), ""),
            ("again", ("static-top", "static-top-shuffled"), ""),
            ("key", ("static-top", "remeasured"), ""),
            ("confirmation", ("lowest", "grass"), ""),
            ("relations", ("lowest", "uniform"), ""),
            ("confirmation", ("signal-top", "grass"), "the largest norms in each period"),
        ],
    ),
    "T_s of 25 to 50 is best and 5 is poor (here against T_s 10, T_u 20)": (
        "worse",
        [
            ("settings", ("period-5", "grass"), "T_s 5, T_u 20"),
            ("settings", ("period-20", "grass"), "T_s 20, T_u 20"),
            ("settings", ("period-25", "grass"), "T_s 25, T_u 100, the defaults"),
            ("settings", ("period-40", "grass"), "T_s 40, T_u 40"),
        ],
    ),
}
"""Claim of the paper, or doubt of its reviewers -> the verdict on the first comparison that is for it; comparisons:
family, methods, and a note in place of the family."""


def claims(found: Found) -> str:
    """Return each claim of the paper, and each doubt of its reviewers, with the comparisons that answer it."""
    lines = []
    for claim, (supporting, comparisons) in CLAIMS.items():
        first = found.families[comparisons[0][0]].get(comparisons[0][1])
        answers = [
            "" if verdict == "undecided" else "**for**" if verdict == supporting else "**against**"
            for verdict in ((first.verdict, first.exact_verdict) if first else ("undecided", "undecided"))
        ]
        cells = dict.fromkeys(range(len(COLUMNS)), "") | dict(zip(VERDICTS, answers, strict=True))
        lines.append([f"**{claim}**", *cells.values()])
        for family, (a, b), note in comparisons:
            title = f"`{a}` - `{b}`" + (f" ({note})" if note else "" if family == "key" else f" ({family})")
            of = found.families[family].get((a, b))
            lines.append(line(title, of, lambda compared: compared.agreement))
    others = "\n".join(f"- **{claim}** {text}" for claim, text in findings(found).items())
    compared = table(["claim of the paper, or doubt", *COLUMNS], lines)
    return f"## The paper's claims\n\n{_WORDS}\n{compared}\n\n{others}\n"


def findings(found: Found) -> dict[str, str]:
    """Return the result for each claim of the paper, and doubt of its reviewers, that is no comparison."""
    key = STUDY.parts["key"]
    spread = summarize(found.rows, key, "grass")
    seeing = {names: of for names, of in found.families["rules"].items() if names[0] not in BLIND}
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
        "Doubt: is there any rule that beats random layers?": " ".join(
            [
                _counts("rules that see the gradients of all layers", seeing),
                _counts("rules that were chosen to run again on other bases", again),
            ]
        ),
        "Doubt: some layers starve.": "not run yet."
        if not waits
        else "Yes. Longest wait of a layer in the key contrast, of "
        f"{BUDGETS[key.task].steps} steps: {', '.join(waits)}.",
        "Doubt: the norm of a batch is noise.": _noise(found),
        "Paper: which layers have large norms differs between tasks, and changes during training.": _order(
            found
        ),
        "Paper: the deviation over seeds is 0.12 points.": "not run yet."
        if spread is None
        else f"Here {spread.exact_deviation:.1f} points over orders of the data, within a base model.",
        "Paper: peak memory is up to 19.97 % lower; at 1,792 tokens LoRA and DoRA pass 24 GB, GRASS does not; "
        "offloading cuts the growth in memory from 1.63 to 0.14 GB.": _memory(found),
        "Paper: overlap gives 1.08x throughput; norms cost 2 to 6 %.": "Unmeasured: [performance](performance.md).",
    }


def _counts(subject: str, found: Mapping[Names, Compared]) -> str:
    """Return how many methods are better and worse than uniform sampling, with the names of the better ones."""
    if not found:
        return f"{subject.capitalize()}: not run yet."
    texts = []
    for measure, place in (("log-loss", "verdict"), ("exact match", "exact_verdict")):
        verdicts = [getattr(of, place) for of in found.values()]
        names = [f"`{name}`" for (name, _), of in found.items() if getattr(of, place) == "better"]
        better = f"{len(names)} better" + (f" ({', '.join(names)})" if names else "")
        texts.append(
            f"by {measure} {better}, {verdicts.count('worse')} worse, {verdicts.count('undecided')} undecided"
        )
    least = sorted(of.log_loss.detectable for of in found.values())
    return (
        f"Of {len(found)} {subject}, against uniform sampling: {'; '.join(texts)}. Detectable: {least[0]:.2f} to "
        f"{least[-1]:.2f} nats."
    )


def _noise(found: Found) -> str:
    """Return how noisy the norms of batches are."""
    if not found.stability:
        return "not run yet."
    steps = sorted({row["step"] for row in found.stability if row["kind"] == "norms"})
    repeated = [stability.repeatability(found.stability, 16, step, 1) for step in steps]
    shares = [stability.noise_share(found.stability, 16, step) for step in steps]
    return (
        f"Of the squared norm of a batch of 16 problems {min(shares):.0%} to {max(shares):.0%} is noise. But two "
        f"batches rank the layers alike: rank correlation {min(repeated):.2f} to {max(repeated):.2f}."
    )


def _order(found: Found) -> str:
    """Return how much alike the layers are ordered in tasks and stages."""
    if not found.stability:
        return "not run yet."
    steps = sorted({row["step"] for row in found.stability if row["kind"] == "norms"})
    correlation = stability.drift(found.stability, 16, steps[0], steps[-1])
    here = f"Rank correlation of the layers: on the small models {correlation:+.2f}, first with last step."
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
        of = "stages of training" if "training" in panel else f"{panel} tasks"
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
    return (
        "Nothing is measured. The planner predicts for LLaMA2-7B, 4 texts of 1,792 tokens, activation checkpointing, "
        f"in GiB: {shown} ([all methods and lengths](evidence/memory.png)). DoRA and the growth are not predicted."
        if shown
        else "not predicted yet."
    )
