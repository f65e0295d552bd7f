"""docs/evidence-log.md: every rule that was tried, why, what was predicted before it ran, and what came out."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from bench.quality.comparison import FAMILIES, Found
from bench.quality.markdown import interval, p_text
from bench.quality.methods import MEASURED, RULES, SETTINGS
from bench.quality.study import CHOSEN, CONTROLS, FIXED, FURTHER, NEW_RULES, REMOVED, STUDY, SUGGESTED


class Note(NamedTuple):
    """Reason of an arm, and the prediction for its held-out log-loss, written before its first run."""

    reason: str
    prediction: str


NOTES: dict[str, Note] = {
    # Rules that know the gradients of all layers.
    "lowest": Note(
        "Layers near the input have the largest norms: is training them, always, as good as sampling?",
        "worse than uniform by 0.1: three quarters of the layers never move",
    ),
    "highest": Note(
        "The control of `lowest`: the layers nearest to the output, always.",
        "worse than `lowest`: word problems need reading, which is done early",
    ),
    "unseen": Note(
        "A random order without repetition: every layer is trained equally often, and none waits long.",
        "equal to uniform within 0.02",
    ),
    "signal-top": Note(
        "No sampling: the layers whose mean gradient is largest are where a step decreases the loss most.",
        "better than uniform by 0.05 to 0.1, as in a first look; it may starve layers",
    ),
    "noisy-top": Note(
        "`signal-top` by the norms of one batch, which one more backward pass a period could measure.",
        "as `signal-top` within 0.03: one batch orders the layers nearly alike",
    ),
    "first-top": Note(
        "`signal-top` measured once, before training: is it the layers, or that they are chosen again?",
        "between `lowest` and `signal-top`",
    ),
    "signal": Note(
        "p proportional to the norm of the mean gradient over 128 problems: MGN with an eighth of the noise.",
        "better than uniform by 0.05",
    ),
    "signal-squared": Note(
        "p proportional to the square, the decrease by a gradient step: between `signal` and `signal-top`.",
        "better than `signal` by 0.01",
    ),
    "signal-inverse": Note("The control: p proportional to 1 / norm.", "worse than uniform by 0.1"),
    "noisy": Note(
        "p proportional to the norm of one batch's gradient, mostly noise. Equal to `signal` if noise orders layers as "
        "the signal does.",
        "between uniform and `signal`: the order is nearly the same",
    ),
    "noisy-squared": Note(
        "`signal-squared` by the norms of one batch: what a method could do that measures all layers once a period.",
        "as `signal-squared` within 0.02",
    ),
    "absolute": Note(
        "p proportional to the mean absolute gradient: AdamW's steps are nearly sign steps, whose decrease is the l1 "
        "norm, not the l2 norm.",
        "better than `signal` by 0.01",
    ),
    "relative": Note(
        "p proportional to norm over weight norm: large weights need large steps, and AdamW's are of one size.",
        "equal to `signal`: weights of all layers are of one size here",
    ),
    "progress": Note(
        "p proportional to the gradient times AdamW's direction: the expected decrease by a unit of learning rate.",
        "better than `signal` by 0.02",
    ),
    "progress-top": Note("`progress` without sampling.", "better than `progress`, equal to `signal-top`"),
    "decrease": Note(
        "p proportional to the measured decrease of the loss by a sign step of each layer alone: the greedy optimum.",
        "the best of the drawn rules",
    ),
    "decrease-top": Note("The same without sampling.", "the best of all rules"),
    "activations": Note(
        "p proportional to the gradient of the layer's output, which frozen layers have as well.",
        "equal to uniform: it hardly differs between layers",
    ),
    "update": Note(
        "p proportional to the size of AdamW's direction, which is smaller where gradients change their sign.",
        "equal to uniform: directions have nearly one size",
    ),
    "hopeful": Note(
        "`signal` times 1 + periods without training: optimism for what was not measured for long, and diminishing "
        "returns for what was just trained.",
        "between uniform and `signal`",
    ),
    "hopeful-progress": Note(
        "The same optimism with `progress`; in a first look it was worse than uniform by 0.035 on one seed.",
        "equal to `hopeful`",
    ),
    "diminishing": Note(
        "`signal` over 1 + periods in which the layer was trained: the more it was trained, the less is left.",
        "equal to `unseen`: it forces all layers to be trained alike",
    ),
    # Settings of GRASS.
    "period-5": Note("T_s of 5: the paper found it poor.", "worse than 10 by 0.01"),
    "period-20": Note("T_s of 20.", "equal"),
    "period-40": Note("T_s and T_u of 40: 12 sets in a run.", "equal in the mean, larger deviation"),
    "period-25": Note("T_s of 25 and T_u of 100, the defaults: 20 sets in a run.", "equal"),
    "window-10": Note("T_u of 10: importance after each period.", "equal"),
    "window-80": Note("T_u of 80.", "equal"),
    "probe-0": Note("No probe: 20 more steps train; importance starts at ones.", "better by 0.02"),
    "probe-5": Note("T_p of 5.", "better by 0.015: five steps order the layers well enough"),
    "ema-0.1": Note("alpha of 0.1: importance hardly moves.", "equal"),
    "ema-1": Note("alpha of 1: importance is the last window's.", "equal"),
    "tau-0.05": Note(
        "p proportional to m^20: the layers with the largest importance, always. Importance of frozen layers is old.",
        "better by 0.05, less than `signal-top`",
    ),
    "tau-0.25": Note(
        "p proportional to m^4: nearly the layers with the largest importance, always.",
        "better by 0.03 if `signal-top` is better",
    ),
    "tau-0.5": Note("p proportional to m^2.", "better by 0.02"),
    "tau-2": Note("p proportional to the root of m: half way to uniform.", "worse by 0.01"),
    "reprobe": Note(
        "`noisy-squared` as a user could have had it: the last step before each draw measured all layers and trained "
        "none (at a temperature of 0.5). Added after `noisy-squared` had run; its code was taken out afterwards.",
        "better than GRASS by 0.03: as `noisy-squared`, less a tenth of the steps",
    ),
    "reprobe-20": Note(
        "The same before every second draw, which takes a twentieth of the steps.",
        "better than GRASS by 0.035",
    ),
    "static-top": Note(
        "`first-top` as a user can have it: static GRASS with a temperature near 0. Added after a quarter of the "
        "runs of `first-top`.",
        "as `first-top` within 0.02, though the probe takes 20 steps",
    ),
    "positions": Note(
        "Each layer in the share of periods in which `remeasured` trained it in the key contrast, whatever its "
        "gradients are: is it the norm of the moment, or that the lowest layer trains most?",
        "as `remeasured` within 0.02: the shares are alike on all bases",
    ),
    "static-top-shuffled": Note(
        "The control of `static-top`: two layers for the whole run, at random.",
        "worse than `static-top` by 0.1, equal to uniform",
    ),
    "remeasured-shuffled": Note(
        "The control of `remeasured`: its probabilities on permuted layers.",
        "equal to uniform, worse than `remeasured` by 0.03",
    ),
    "remeasured": Note(
        "`noisy-squared` as a user can have it: the last step of each period trains, and measures all layers. No step "
        "is lost to a probe, nor to a measurement as with `reprobe`.",
        "better than uniform by 0.03, than GRASS by 0.04",
    ),
    "scale-mean": Note("softmax(m / mean(m)), the paper's normalised figures.", "equal"),
    "scale-zscore": Note("softmax of standardized importance.", "equal"),
    "scale-none": Note("The formula to the letter: norms near 0.1 make it uniform.", "equal to uniform"),
    "reset": Note("Moments restart when a layer is drawn again.", "worse by 0.02"),
    "ahead-0": Note(
        "Layers are drawn at the end of a period, so that no window of a layer is a single step.",
        "better by 0.005: a quarter of the measurements have one step with 1",
    ),
    "ahead-5": Note("Layers are drawn five steps before they train, rather than one.", "equal"),
    "active-1": Note("One of eight layers at a time, half of the budget.", "worse by 0.05"),
    "active-4": Note("Four of eight layers at a time, twice the budget.", "better by 0.05"),
    "grass-floor": Note("Each layer has at least half of its uniform probability.", "equal"),
}

CONFIRMATIONS = {
    "grass": "better than uniform by 0.02, as in the key contrast that was run before",
    "lowest": "better than uniform by 0.08, less than at first",
    "signal-squared": "better than uniform by 0.05, less than at first",
    "signal-top": "better than uniform by 0.1, less than at first",
}
"""Predictions for arms that are run again on other bases, by the results on the first ones."""

FURTHER_PREDICTIONS = {
    "static-top": "key: better than GRASS by 0.08, less than before, and decided: twice the pairs",
    "lowest": "other bases: better than uniform by 0.12, than `static-top` by 0.02",
}
"""Predictions for `FURTHER`, written before they ran on these bases."""

NOT_BUILT = """\
Norm times learning rate over weight norm is `relative`, as all layers have one learning rate. An estimate of the norm
of the mean gradient from some coordinates of each layer was not built: `signal` is the norm that it estimates, and
`noisy` has the noise that it would take away, so that their difference is the most that it could gain: {bound}.
Rules are code of the study alone, kept so that it can be run again.
"""

REPLACED = """\
## Runs that were replaced

All methods of a part must begin with the same weights, and base models cannot be trained again on another machine. So
when methods were added to the key contrast it was run anew; the verdicts of its first runs, whose rates were chosen for
each base, were the same. These runs are in the history of the repository, and others: relations for 600 steps, too few
for layer methods to answer better than by guessing one of three; settings on bases of two machines; and modules that
were drawn by number, whatever their size. `signal-top` and `progress-top` were run with the rules at rates that turned
out not to be their best, and lack runs there. Settings ran on other bases again, since on the first ones the best rate
of GRASS was twice that of all other parts; none had been decided.

That a verdict needs the same sign on all bases was added when the first key contrast and the rules were known; the
table over all base models, when the key contrast and the confirmation were, and before the runs with controls on other
bases. Each part that is run adds its bases to that table: first the key contrast, the confirmation and `further`, then
`methods` and `units`, `again` with controls that tell the norm from the position of a layer, and `settings`. `shuffled`
was added to the last two, as the four bases of the key contrast decide little of it. The list of comparisons was
last changed while the runs of `settings` were under way; GRASS against uniform sampling, `shuffled`, `static` and full
fine-tuning were in it before. `shuffled` against uniform sampling was added when its results were known. Comparisons
with `cyclic` were added last, when all other runs were known: it ran on the bases of `again`, since those of `rules`
could not be trained again on the machine at hand.
"""


def log_page(found: Found) -> str:
    """Return docs/evidence-log.md."""

    def outcome(family: str, name: str, other: str) -> str:
        if (name, other) not in FAMILIES[family][1]:
            return "not compared"
        of = found.families[family].get((name, other))
        if of is None:
            return "not run"
        return (
            f"{interval(of.log_loss)} {of.verdict}, p {p_text(of.p_value)}; "
            f"exact match {interval(of.exact, 1)} points, {of.exact_verdict}"
        )

    def lines(names: Iterable[str], predictions: Mapping[str, str], *against: tuple[str, str]) -> list[str]:
        """Return a line for each name, with its outcomes in each family of comparisons, against a method."""
        return [
            f"| `{name}` | {NOTES[name].reason if name in NOTES else 'the default'} | "
            f"{predictions.get(name) or NOTES[name].prediction} | "
            + " | ".join("" if name == other else outcome(family, name, other) for family, other in against)
            + " |"
            for name in names
        ]

    def header(*columns: str) -> list[str]:
        names = ("arm", "reason", "prediction", *columns)
        return ["| " + " | ".join(names) + " |", "| " + " | ".join("---" for _ in names) + " |"]

    rules, confirmation = STUDY.parts["rules"], STUDY.parts["confirmation"]
    own_rates = ", ".join(f"`{name}`" for name in FIXED)
    return "\n".join(
        [
            "# Rules and settings that were tried\n",
            "<!-- Generated by `python -m bench.quality verify --write`: do not edit. -->\n",
            "Each arm with its reason, what was predicted before the runs of the table, and its outcome: differences",
            "of held-out log-loss on arithmetic, negative is better, and of exact match, positive is better.",
            "The [tables](evidence-tables.md) explain the study and have all numbers; [Evidence](evidence.md) is the",
            "summary.\n",
            "## Rules, against uniform sampling\n",
            f"They see gradients of all layers on {MEASURED} other problems at the beginning of each period, which no",
            "method that saves memory does: a rule that does not help here need not be built. (`lowest`, `highest`,",
            "`unseen` and `positions` see none; `signal-top` is below.) `unseen` trains the layers that have waited",
            "longest, and `cyclic` all in order. Learning rates are those of uniform sampling,",
            f"but for {own_rates}, which have",
            f"their own. On {len(rules.bases)} bases, {rules.orders} orders of the data each.\n",
            *header("against uniform sampling", "against `unseen`"),
            *lines(
                (name for name in rules.methods if name in RULES),
                {},
                ("rules", "uniform"),
                ("turns", "unseen"),
            ),
            "\nAdded later, and run on four other bases each, those of `methods` and of `again`:\n",
            *header("against uniform sampling", "against `unseen`", "against `cyclic`"),
            *lines(
                NEW_RULES, {}, ("methods", "uniform"), ("later-rules", "unseen"), ("later-rules", "cyclic")
            ),
            "",
            *header("against uniform sampling", "against `cyclic`"),
            *lines(["progress-top", *CONTROLS], {}, ("again", "uniform"), ("order", "cyclic")),
            "\n" + NOT_BUILT.format(bound=outcome("bound", "signal", "noisy")),
            "\n## Settings, against GRASS\n",
            "At the learning rates of GRASS, but for those named above and `grass-floor`, which have their own.\n",
            *header("outcome", "first bases"),
            *lines(
                (name for name in SETTINGS if name not in SUGGESTED),
                {},
                ("settings", "grass"),
                ("first-settings", "grass"),
            ),
            *lines(["grass-floor"], {}, ("units", "grass"), ("first-settings", "grass")),
            "\n## The best, on other bases\n",
            "The best of many arms look better than they are. So the best rules ran again, with what they suggested,",
            f"on {len(confirmation.bases)} other bases, {confirmation.orders} orders of the data each.",
            f"{', '.join(f'`{name}`' for name in CHOSEN)} were chosen before. The others were thought of after earlier",
            "results, some on these bases: they explore.\n",
            *header("against uniform sampling", "against GRASS"),
            *lines(
                ("grass", *CHOSEN, *SUGGESTED, *REMOVED),
                CONFIRMATIONS,
                ("confirmation", "uniform"),
                ("confirmation", "grass"),
            ),
            "\n## What became of them\n",
            "Methods that a user can choose and controls, at their own rates: on the bases and orders of the key",
            "contrast, and on other bases.\n",
            *header(
                "key: against uniform",
                "against GRASS",
                "`further`: against uniform",
                "against GRASS",
                "`again`: against `cyclic`",
            ),
            *lines(
                FURTHER,
                FURTHER_PREDICTIONS,
                ("key", "uniform"),
                ("key", "grass"),
                ("further", "uniform"),
                ("further", "grass"),
                ("order", "cyclic"),
            ),
            f"\n{REPLACED}",
        ]
    )
