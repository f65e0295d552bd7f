"""The claims of the paper, and what the page says of them.

Would catch: an answer that the comparison does not give, or one for the wrong side; rules counted by another verdict.
"""

import re

from bench.quality.claims import CLAIMS, findings
from bench.quality.comparison import FAMILIES, Found
from bench.quality.evidence import in_short, page
from bench.quality.methods import BLIND, RULES
from bench.quality.study import STUDY
from grass.finetune.run_folder import write_rows
from tests.support.study import found_in, rows_of


def line_of(text, names):
    """The cells of a comparison in the table of claims."""
    (line,) = [
        line for line in text.splitlines() if line.startswith(f"| {names} |") and line.count("|") == 11
    ]
    return [cell.strip() for cell in line.split("|")[2:-1]]


def test_claims_are_better_worse_undecided_or_not_run(rows, tmp_path):
    found = found_in(rows, tmp_path)
    claims = page(found).partition("## The paper's claims")[2]
    pairs, loss, bases, p_value, _, verdict, exact, _, exact_verdict = line_of(claims, "`grass` - `uniform`")
    assert (pairs, bases, p_value, verdict) == ("32", "4 of 4", "< 0.001", "better")
    assert loss.startswith("-0.03")
    assert exact.startswith("+3.0 [")
    assert exact_verdict == "better"
    assert line_of(claims, "`grass` - `shuffled`") == ["not run", *[""] * 8]
    assert line_of(claims, "`grass` - `static`")[5] == "undecided"
    full = line_of(claims, "`grass` - `full`")
    assert (full[5], full[8]) == ("worse", "worse")
    assert full[6].startswith("-10.0 [")
    of = findings(found)
    rules = of["Doubt: is there any rule that beats random layers?"]
    assert rules.startswith("Rules that see the gradients of all layers: not run yet.")
    starving = of["Doubt: some layers starve."]
    assert starving.endswith("in the key contrast, of 500 steps: `uniform` 30, `grass` 30, `static` 30.")
    assert "`lora-r32`" not in in_short(found)
    lora = rows_of("lora-r32", 0.1, 0.005, STUDY.parts["methods"])
    for r in lora:
        r["exact"] = 0.9  # sure of what is wrong, and right more often
    more = rows_of("grass", 0.0, 0.005, STUDY.parts["methods"])
    text = in_short(found_in([*rows, *lora, *more], tmp_path))
    assert re.search(r"`lora-r32` \| 4 \| -0\.1\d+ \[.*\] better\* \| -\d+\.\d \[.*\] worse\* \|", text)
    memory = next(text for claim, text in of.items() if "1,792 tokens" in claim)
    assert memory == "not predicted yet."
    write_rows(tmp_path / "memory.jsonl", [{"method": "lora-r128", "peak_gib": 20.26}])
    memory = next(text for claim, text in findings(Found.of(tmp_path)).items() if "1,792 tokens" in claim)
    assert "LoRA of rank 128 20.3 (" in memory


def test_every_comparison_of_a_claim_is_made():
    for _, comparisons in CLAIMS.values():
        for family, names, _ in comparisons:
            assert names in FAMILIES[family][1]


def test_a_claim_is_for_or_against_by_its_first_comparison(rows, tmp_path):
    """`static-top` that is better is against the claim that sampling is needed."""
    top = [r | {"exact": 0.9} for r in rows_of("static-top", -0.3, 0.005)]
    text = page(found_in([*rows, *top], tmp_path))

    def answers(claim):
        (line,) = [line for line in text.splitlines() if line.startswith(f"| **{claim}")]
        cells = [cell.strip() for cell in line.split("|")]
        return cells[7], cells[10]

    assert answers("Sampling by gradient norms") == ("**for**", "**for**")
    assert answers("GRASS is close to full") == ("**against**", "**against**")
    assert answers("Sampling is needed") == ("**against**", "**against**")
    assert answers("Adapting during training")[0] == ""
    assert answers("GRASS is better than LISA") == ("", "")  # not run


def test_rules_are_counted_by_verdict(rows, tmp_path):
    """With all rules and eight pairs, a clear one is found."""
    part = STUDY.parts["rules"]
    rules = [name for name in part.methods if name in RULES]
    shifts = {"signal": -0.08, "signal-inverse": 0.1}
    more = [r for name in rules for r in rows_of(name, shifts.get(name, 0.0), 0.005, part)]
    uniform = rows_of("uniform", 0.0, 0.002, part)
    of = findings(found_in([*rows, *more, *uniform], tmp_path))
    line = of["Doubt: is there any rule that beats random layers?"]
    assert line.startswith(
        f"Of {len(rules) - len(set(BLIND) & set(rules))} rules that see the gradients of all layers, against uniform "
        "sampling: by log-loss 1 better (`signal`), "
    )
    assert re.search(r"[12] worse, \d+ undecided; by exact match \d+ better", line)


def test_norms_of_the_real_model_are_compared_by_task(tmp_path, measured):
    """Four layers in one order, in the opposite one, and with a swap of two: correlation 1, -1 and 0.8."""
    write_rows(tmp_path / "stability.jsonl", measured)
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
