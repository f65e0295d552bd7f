"""The claims of the paper, and what the page says of them.

Would catch: an answer that the comparison does not give, or one for the wrong side; rules counted by another verdict.
"""

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
    assert compared == "`grass` - `uniform`"
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
        "GRASS is better than LoRA",
    ):
        assert answers_to(text, claim) == ["for", "for"]


def test_chosen_rules_are_counted_against_uniform_sampling(rows, tmp_path):
    """Against GRASS, which is better than this rule."""
    part = STUDY.parts["confirmation"]
    shifts = {"uniform": 0.0, "lowest": -0.1, "grass": -0.3}
    more = [r for name, shift in shifts.items() for r in rows_of(name, shift, 0.005, part)]
    text = findings(found_in([*rows, *more], tmp_path))["Doubt: does any rule beat sampling without norms?"]
    assert (
        "chosen to run again on other bases, against uniform sampling of 1 by log-loss 1 better (`lowest`), 0 worse"
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


def test_findings_are_those_of_the_rows(rows, tmp_path):
    of = findings(found_in(rows, tmp_path))
    rules = of["Doubt: does any rule beat sampling without norms?"]
    assert rules.startswith(
        "[Rules](evidence-log.md) that see all gradients, against uniform sampling not run yet; "
    )
    starving = of["Doubt: some layers starve."]
    assert starving.endswith("contrast, of 500 steps: `uniform` 30, `grass` 30, `static` 30.")
    memory = next(text for claim, text in of.items() if "1,792 tokens" in claim)
    assert memory == "not predicted yet."
    peaks = {"lora-r128": 20.26, "lisa": 22.34, "grass-streamed": 22.36, "grass-resident": 26.5}
    write_rows(
        tmp_path / "memory.jsonl", [{"method": name, "peak_gib": peak} for name, peak in peaks.items()]
    )
    memory = next(text for claim, text in findings(Found.of(tmp_path)).items() if "1,792 tokens" in claim)
    assert 'LISA 22.3, LoRA of rank 128 20.3, `"resident"` 26.5, `"streamed"` 22.4;' in memory
    assert "Below 24 GB: LISA, LoRA of rank 128." in memory  # 24 GB are 22.35 GiB


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
    order = [
        r for name, shift in (("lowest", 0.0), ("cyclic", 0.2)) for r in rows_of(name, shift, 0.002, again)
    ]
    of = findings(found_in([*more, *order], tmp_path))
    line = of["Doubt: does any rule beat sampling without norms?"]
    count = len({*rules} - {*BLIND, "signal-inverse"})
    assert (
        f"against uniform sampling of {count} by log-loss 1 better (`signal`), 0 worse and by exact" in line
    )
    assert f"against `unseen` of {count} by log-loss 0 better, {count} worse and" in line
    assert "against `cyclic` of 1 by log-loss 1 better (`lowest`), 0 worse" in line


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
        text
        for claim, text in findings(Found.of(tmp_path)).items()
        if claim.startswith("Paper: which layers")
    )
    assert "+0.80 to +0.80 between two of 2 arithmetic tasks" in text
    assert "+1.00 to +1.00 between two of 2 commonsense tasks" in text
    assert "-1.00 to -0.80 between one of arithmetic and one of commonsense" in text
