"""The claims of the paper, and what the page says of them.

Would catch: an answer that the comparison does not give, or one for the wrong side; rules counted by another verdict.
"""

from bench.quality import stability
from bench.quality.claims import CLAIMS, claims, comparisons_of_claims, findings
from bench.quality.comparison import ACROSS, FAMILIES, Found
from bench.quality.markdown import interval
from bench.quality.methods import BLIND, RULES
from bench.quality.study import STUDY
from grass.finetune.run_folder import write_rows
from tests.support.study import found_in, rows_of


def line_of(text, claim):
    """The cells of a claim."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {claim}")]
    return [cell.strip() for cell in line.split("|")[2:-1]]


def answers_to(text, claim):
    """The verdicts on a claim, without their differences."""
    return [cell.split(":")[0] for cell in line_of(text, claim)[1:]]


def test_claims_are_for_against_undecided_or_not_run(rows, tmp_path):
    """An answer for the wrong side, or one that its comparison does not give."""
    top = [r | {"exact": 0.9} for r in rows_of("static-top", -0.3, 0.005)]
    for r in rows:
        if r["method"] == "full":
            r["exact"] = 0.5 + 0.05 * r["base"]
    found = found_in([*rows, *top], tmp_path)
    text = claims(found)
    compared, by_loss, by_exact = line_of(text, "Sampling by gradient norms")
    of = found.across["grass", "uniform"]
    assert compared == "`grass` - `uniform`, 4 bases"
    assert by_loss == f"for: {interval(of.log_loss.difference)}"
    assert by_exact == f"for: {interval(of.exact.difference, 1)}"
    assert answers_to(text, "GRASS is close to full") == ["against", "undecided"]
    assert answers_to(text, "Sampling is needed") == ["against", "against"]
    assert answers_to(text, "Adapting during training") == ["undecided", "undecided"]
    assert answers_to(text, "GRASS is better than LISA") == ["not run", "not run"]
    text = comparisons_of_claims(found)
    (compared,) = line_of(text, "Sampling by gradient norms")
    assert compared == "`grass` - `uniform`: better; `grass` - `uniform` (relations): not run"
    (compared,) = line_of(text, "GRASS is close to full")
    assert compared.startswith("`grass` - `full`: worse / undecided; ")


def test_a_doubt_is_confirmed_by_what_speaks_against_the_norms(rows, tmp_path):
    """Permuted probabilities, or shares without norms, that do better; LoRA that does worse."""
    key, again, settings = (STUDY.parts[name] for name in ("key", "again", "settings"))
    more = rows_of("shuffled", -0.3, 0.005, key)
    more += [
        r
        for name, shift in (("remeasured", 0.0), ("positions", -0.3))
        for r in rows_of(name, shift, 0.005, again)
    ]
    more += [
        r
        for name, shift in (("grass", 0.0), ("lora-r32", 0.3))
        for r in rows_of(name, shift, 0.005, settings)
    ]
    text = claims(found_in([*rows, *more], tmp_path))
    for claim in (
        "Doubt: the same probabilities",
        "Doubt: layers trained as often",
        "GRASS is better than LoRA (by",
    ):
        assert answers_to(text, claim) == ["for", "for"]


def test_rules_that_ran_again_are_counted_against_uniform_sampling(tmp_path):
    """Against GRASS, which is better than this rule; or one that sees no norms."""
    part = STUDY.parts["confirmation"]
    shifts = {"uniform": 0.0, "lowest": -0.1, "signal-squared": -0.1, "signal-top": 0.1, "grass": -0.3}
    more = [r for name, shift in shifts.items() for r in rows_of(name, shift, 0.005, part)]
    text = findings(found_in(more, tmp_path))["Doubt: no rule beats sampling without norms."]
    assert (
        "on other bases: 1 of 2 by log-loss (`signal-squared`) and 1 of 2 by exact match (`signal-squared`); "
        in text
    )


def test_a_comparison_of_a_part_is_of_its_pairs(rows, tmp_path):
    """The comparison on all bases in its place, or the other way round."""
    part = STUDY.parts["relations"]
    more = [r for name, shift in (("grass", 0.2), ("uniform", 0.0)) for r in rows_of(name, shift, 0.01, part)]
    (compared,) = line_of(
        comparisons_of_claims(found_in([*rows, *more], tmp_path)), "Sampling by gradient norms"
    )
    assert compared == "`grass` - `uniform`: better; `grass` - `uniform` (relations): worse"


def test_what_no_comparison_answers_is_told_from_the_rows(rows, tmp_path):
    """The wait of another method, or a mean in place of the longest; an answer for the wrong side."""
    for r in rows:
        r["longest_wait"] = {"uniform": 40, "grass": 50, "static": 60}.get(r["method"], 10) - 4 * (
            r["order"] % 2
        )
    of = findings(found_in(rows, tmp_path))
    assert of["Doubt: no rule beats sampling without norms."].count("not run yet") == 6
    assert of["Doubt: some layers starve."] == (
        "For, if compared with uniform sampling: the longest wait of a layer in a run of the key contrast, of 500 "
        "steps, a mean over runs and the largest: `uniform` 38 (40), `grass` 48 (50), `static` 58 (60)."
    )
    same = [r | {"longest_wait": 40} for r in rows]
    assert findings(found_in(same, tmp_path))["Doubt: some layers starve."].startswith("Against,")
    spread = [
        r | {"exact": 0.5 + 0.1 * (r["order"] % 2) + 0.2 * r["base"]} if r["method"] == "grass" else r
        for r in rows
    ]
    text = findings(found_in(spread, tmp_path))["The deviation over seeds is 0.12 points."]
    assert ": 5.3 points within a base." in text  # of 0.1 in every second of eight orders
    nothing = findings(Found.of(tmp_path / "nothing"))
    assert sum("not run yet" in text.lower() for text in nothing.values()) == 5


def test_predicted_peaks_answer_the_claim_of_memory(tmp_path):
    """24 GB are 22.35 GiB; a claim that holds for one of two."""

    def told(**changes):
        peaks = {"full": 51.0, "lisa": 19.1, "lora-r128": 22.4, "grass": 20.0, "grass-resident": 22.3}
        peaks |= {"grass-streamed": 16.8, "lora-r8": 10.0} | changes
        rows = [{"method": name, "peak_gib": peak} for name, peak in peaks.items()]
        write_rows(tmp_path / "memory.jsonl", rows)
        return next(text for claim, text in findings(Found.of(tmp_path)).items() if "1,792" in claim)

    assert told().startswith("For, by prediction")
    assert (
        '(24 GB are 22.4): full 51.0, LISA 19.1, LoRA of rank 128 22.4, GRASS with `offload="none"` 20.0, with '
        '`"resident"` 22.3, with `"streamed"` 16.8. ' in told()
    )
    assert told(**{"lora-r128": 22.34}).startswith("Against, by prediction")
    assert told(grass=22.36).startswith("Against, by prediction")
    (tmp_path / "memory.jsonl").unlink()
    assert "Not predicted yet." in findings(Found.of(tmp_path)).values()


def test_noise_is_told_from_the_measured_norms(measured, tmp_path):
    """Noise of other batches or stages; an answer for the wrong side."""
    enough = [r | {"norms": r["norms"] * 10} if r["kind"] == "norms" else r for r in measured]
    write_rows(tmp_path / "stability.jsonl", enough)
    found = Found.of(tmp_path)
    steps = sorted({r["step"] for r in enough if r["kind"] == "norms"})
    shares = [100 * stability.noise_share(enough, 16, step) for step in steps]
    repeated = [stability.repeatability(enough, 16, step, 1) for step in steps]
    text = findings(found)["Doubt: the norm of a batch is noise."]
    assert f" as to its size: {min(shares):.0f} to {max(shares):.0f} % of the squared norm of 16" in text
    assert text.startswith("For" if max(shares) > 50 else "Against")
    order = "For" if min(repeated) < 0.7 else "Against"
    assert f"{order} as to the order of layers: their rank correlation is {min(repeated):.2f} to" in text


def test_every_comparison_of_a_claim_is_made():
    for _, places in CLAIMS.values():
        for place, names, _ in places:
            assert names in (ACROSS if place == "bases" else FAMILIES[place][1])


def test_rules_are_counted_by_verdict(tmp_path):
    """With all rules and eight pairs, a clear one is found."""
    part = STUDY.parts["rules"]
    rules = [name for name in part.methods if name in RULES]
    shifts = {"signal": -0.08, "signal-inverse": 0.1, "unseen": -0.2}
    more = [r for name in rules for r in rows_of(name, shifts.get(name, 0.0), 0.005, part)]
    more += rows_of("uniform", 0.0, 0.002, part)
    again = STUDY.parts["again"]
    order = rows_of("cyclic", 0.2, 0.002, again)
    for name in ("lowest", "progress-top", "static-top-shuffled"):
        order += rows_of(name, 0.0, 0.002, again)
    of = findings(found_in([*more, *order], tmp_path))
    line = of["Doubt: no rule beats sampling without norms."]
    count = len({*rules} - {*BLIND, "signal-inverse"})
    assert f"better than uniform sampling: 1 of {count} by log-loss (`signal`) and" in line
    assert f"better than `unseen`, longest unseen first: 0 of {count} by log-loss and" in line
    assert "`again` that follow norms 1 of 1 by log-loss (`progress-top`)" in line
    assert "those that do not 2 of 2 by log-loss (`lowest`, `static-top-shuffled`)" in line


def test_norms_of_the_real_model_are_compared_by_task(tmp_path, measured):
    """Four layers in one order, in the opposite one, and with a swap of two: correlation 1, -1 and 0.8."""
    enough = [r | {"norms": r["norms"] * 10} if r["kind"] == "norms" else r for r in measured]
    write_rows(tmp_path / "stability.jsonl", enough)
    order, swapped = [1.0, 2.0, 3.0, 4.0], [1.0, 3.0, 2.0, 4.0]
    panels = {"arithmetic": [order, swapped], "commonsense": [order[::-1], order[::-1]]}
    rows = [
        {"panel": panel, "name": str(i), "norms": norms}
        for panel, of in panels.items()
        for i, norms in enumerate(of)
    ]
    write_rows(tmp_path / "norms.jsonl", rows)
    text = next(
        text for claim, text in findings(Found.of(tmp_path)).items() if claim.startswith("Which layers")
    )
    assert "+0.80 to +0.80 between two of 2 arithmetic tasks" in text
    assert "+1.00 to +1.00 between two of 2 commonsense tasks" in text
    assert "-1.00 to -0.80 between one of arithmetic and one of commonsense" in text
