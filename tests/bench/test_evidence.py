"""The page of evidence and its figures.

Would catch: a sentence that the rows do not give; a number of the page changed by hand, or left behind by new rows; an
arm without reason and prediction; a figure that fails on what the study writes.
"""

import json
import re
from dataclasses import asdict

import pytest

from bench.quality import __main__ as command
from bench.quality import figures, real
from bench.quality.comparison import FAMILIES, Found, across
from bench.quality.defaults import OTHER_VALUES, conclusion, defaults
from bench.quality.evidence import BEGIN, END, in_short, page, written_pages
from bench.quality.log import NOTES, log_page
from bench.quality.markdown import interval, p_text
from bench.quality.methods import CONFIG, METHODS, RULES, SETTINGS
from bench.quality.study import (
    CONTROLS,
    FURTHER,
    KEY,
    MODULES,
    OTHERS,
    REMOVED,
    SEARCH,
    SMALL,
    STUDY,
    UNITS,
    rate_of,
)
from bench.quality.tables import TITLES, across_table, tables_page
from bench.quality.training import make_model
from grass.errors import GrassError
from grass.finetune.run_folder import read_rows, write_rows
from tests.support.study import BEST, found_in, row, rows_of, write_real


def test_what_fixed_layers_gain_is_told_at_both_rates(rows, tmp_path):
    """The layers that they trained, their rate, and the search at the rate of uniform sampling."""
    top = rows_of("static-top", -0.3, 0.005)
    for r in top:
        r["layers"] = [0.9, 0.0, 0.9, *[0.0] * 5] if r["base"] == 3 else [0.9, 0.9, *[0.0] * 6]
        if r["order"] in SEARCH.orders and r["lr"] == BEST:
            r |= {"log_loss": 0.96, "exact": 0.7}
        elif r["order"] in SEARCH.orders and r["lr"] == SEARCH.rates[0]:
            r["log_loss"] = 0.8
    for r in top:
        if r["order"] not in SEARCH.orders:
            r["lr"] = SEARCH.rates[0]
    # A search that is best at its lowest rate goes on below it.
    lower = [r | {"lr": SEARCH.rates[0] / 2, "log_loss": 2.0} for r in top if r["lr"] == SEARCH.rates[2]]
    text = in_short(found_in([*rows, *top, *lower], tmp_path))
    assert "in 24 of 32 runs." in text
    assert "The search gave `static-top` 0.5 times the learning rate of `uniform`." in text
    assert (
        "`static-top` - `uniform` -0.040 [-0.040, -0.040] nats, +20.0 [+20.0, +20.0] points, 4 bases." in text
    )


def test_searches_in_which_exact_match_would_have_chosen_another_rate_are_counted(rows, tmp_path):
    for r in rows:
        if r["method"] == "grass" and r["order"] in SEARCH.orders and r["lr"] == SEARCH.rates[0]:
            r["exact"] = 0.9
    text = " ".join(tables_page(found_in(rows, tmp_path)).split())
    assert "A search by it would have chosen another rate in 1 of the 4 searches" in text


def test_in_short_says_what_the_verdicts_are(rows, tmp_path):
    """A verdict on the wrong comparison, or the same sentence whatever was found."""
    assert in_short(found_in([], tmp_path)) == "Not run yet.\n"
    text = in_short(found_in(rows, tmp_path))
    assert re.search(
        r"GRASS is better than uniform sampling: -0\.03\d \[.*?\] nats, \+3\.0 \[.*?\] points, 4 bases\.",
        text,
    )
    assert "GaLore" not in text
    assert (
        "full fine-tuning answers 70 % exactly and GRASS 60 %. A step of GRASS trains 25 % of the parameters."
        in text
    )
    assert "largest norms" not in text
    assert "opposite directions" not in text
    more = rows_of("static-top", -0.3, 0.005)
    for r in more:
        r["exact"] = 0.1
    text = in_short(found_in([*rows, *more], tmp_path))
    assert "largest norms, is better by log-loss and worse by exact match than uniform sampling" in text
    assert "exclude 0, for `static-top` - `uniform`, `static-top` - `grass`, `static-top` - `full`." in text
    unclear = [r | {"exact": 0.485 + 0.05 * r["base"]} if r["method"] == "grass" else r for r in rows]
    assert "opposite directions" not in in_short(
        found_in(unclear, tmp_path)
    )  # exact match worse, its interval with 0
    worse = [r for r in rows if r["method"] != "grass"] + rows_of("grass", 0.1, 0.005)
    assert "GRASS is worse than uniform sampling" in in_short(found_in(worse, tmp_path))
    noisy = [r for r in rows if r["method"] != "grass"] + rows_of("grass", 0.03, 0.1)
    for r in noisy:
        r["exact"] = 0.5
    assert "GRASS is not shown to differ from uniform sampling" in in_short(found_in(noisy, tmp_path))
    for r in noisy:
        if r["method"] == "grass":
            r["exact"] = 0.5 + 0.05 * r["base"]
    assert "GRASS is not shown" in in_short(found_in(noisy, tmp_path))
    for r in noisy:
        if r["method"] == "grass":
            r["exact"] = 0.55 + 0.06 * r["base"]
    text = in_short(found_in(noisy, tmp_path))
    assert "GRASS is not shown to differ from uniform sampling" in text
    assert re.search(r"\[[^]]*\] nats, \+\d+\.\d \[[^]]*\]\\\* points, 4 bases\.", text)
    for r in noisy:
        if r["method"] == "grass":
            r["exact"] = 0.9 + r["base"] / 100
    text = in_short(found_in(noisy, tmp_path))
    assert "GRASS is better by exact match than uniform sampling" in text


def cells_of(text, title):
    """The cells of the lines of tables that begin with a title."""
    lines = [line for line in text.splitlines() if line.startswith(f"| {title} |")]
    return [[cell.strip() for cell in line.split("|")[2:-1]] for line in lines]


def test_numbers_stand_in_their_columns(rows, tmp_path):
    """The verdict or p of the other measure, or the comparison with another method: GRASS is better than `shuffled` by
    log-loss with noise, and worse by exact match without."""
    shuffled = [r | {"exact": 0.9 if r["order"] < 5 else 0.4} for r in rows_of("shuffled", 0.05, 0.05)]
    top = [r | {"exact": 0.1} for r in rows_of("static-top", 0.01, 0.005)]
    found = found_in([*rows, *shuffled, *top], tmp_path)
    names = ("grass", "shuffled")
    of, of_pairs = found.across[names], found.families["key"][names]
    assert of.log_loss.verdict == "better"
    assert p_text(of.log_loss.p_value) != p_text(of.exact.p_value)
    assert p_text(of_pairs.p_value) != p_text(of_pairs.exact_p_value)
    ((bases, loss, loss_p, least, verdict, points, points_p, points_verdict),) = cells_of(
        across_table(found), "`grass` - `shuffled`"
    )
    assert (bases, loss, points) == ("4", interval(of.log_loss.difference), interval(of.exact.difference, 1))
    assert (loss_p, points_p) == (p_text(of.log_loss.p_value), p_text(of.exact.p_value))
    assert (least, verdict, points_verdict) == (f"{of.log_loss.detectable:.3f}", "better", "worse")
    ((pairs, loss, _, loss_p, least, verdict, points, points_p, points_verdict),) = cells_of(
        tables_page(found).split("## Parts of study A")[1], "`grass` - `shuffled`"
    )
    assert (pairs, loss, points) == ("32", interval(of_pairs.log_loss), interval(of_pairs.exact, 1))
    assert (loss_p, points_p) == (p_text(of_pairs.p_value), p_text(of_pairs.exact_p_value))
    assert (least, verdict, points_verdict) == (f"{of_pairs.log_loss.detectable:.3f}", "better", "worse")
    (*_, against_uniform, against_grass, _, _, _) = cells_of(log_page(found), "`static-top`")[-1]
    for text, other in ((against_uniform, "uniform"), (against_grass, "grass")):
        compared = found.families["key"]["static-top", other]
        assert text.startswith(
            f"{interval(compared.log_loss)} {compared.verdict}, p {p_text(compared.p_value)}; "
        )
        assert text.endswith(f"{interval(compared.exact, 1)} points, worse")


def test_defaults_are_told_with_the_verdicts_on_other_values(rows, tmp_path):
    """A verdict on another value, or none; a power that is not that of what is undecided."""
    part, units = STUDY.parts["settings"], STUDY.parts["units"]
    shifts = {"grass": (0.0, 0.005), "probe-0": (-0.2, 0.005), "probe-5": (0.2, 0.005), "tau-2": (0.0, 0.1)}
    more = [r for name, (shift, noise) in shifts.items() for r in rows_of(name, shift, noise, part)]
    more += [
        r
        for name, shift in (("grass", 0.0), ("grass-inside", 0.2))
        for r in rows_of(name, shift, 0.005, units)
    ]
    top = [r | {"exact": 0.5} for r in rows_of("static-top", -0.3, 0.005)]
    found = found_in([*rows, *more, *top], tmp_path)
    text = defaults(found)
    assert f"at GRASS's rate, {BEST:g}" in text
    ((default, values),) = cells_of(text, "`probe_steps`")
    assert default == "20"
    assert re.fullmatch(r"0: -0\.[12]\d* \[.*\] better; 5: \+0\.[12]\d* \[.*\] worse", values)
    ((default, values),) = cells_of(text, "`sample_interval`")
    assert (default, values.split("; ")[0]) == ("25 (10 here)", "5: not run")
    ((_, values),) = cells_of(text, "`always_active`")
    assert re.fullmatch(r"none: \+0\.\d+ \[.*\] worse", values)
    ((_, values),) = cells_of(text, "`sampler`")
    assert re.search(r'not run; "static", `temperature` 0\.01: -0\.\d+ \[[^]]*\] better; ', values)
    assert re.search(
        r'"uniform": \+0\.03\d \[\+0\.\d+, \+0\.\d+\] worse; ', values
    )  # GRASS is better than it
    assert re.search(
        r'Better than the default: `sampler` "static", `temperature` 0\.01; `probe_steps` 0\. Worse than the default: '
        r'`sampler` "uniform"; `probe_steps` 5; `always_active` none\. The others',
        conclusion(found),
    )
    static, tau = found.across["grass", "static"], found.families["settings"]["tau-2", "grass"]
    low, high = sorted([static.log_loss.detectable, tau.log_loss.detectable])
    assert f"undecided: differences below {low:.2f} to {high:.2f} nats could not be decided" in text


def test_values_of_the_defaults_are_those_that_ran():
    """A value in the page that is not that of the method's runs."""
    model = make_model(0)
    for option, values in OTHER_VALUES.items():
        for method, text in values.items():
            config = (METHODS | SETTINGS)[method](model, CONFIG).config
            shown = {option: text.split(", `")[0], **dict(re.findall(r"`(\w+)` ([\w.]+)", text))}
            assert {name: str(getattr(config, name)) for name in shown} == {
                name: value.strip('"') for name, value in shown.items()
            }


def test_the_second_task_is_told_by_log_loss(rows, tmp_path):
    part = STUDY.parts["relations"]
    of_task = [r | {"exact": 0.9} for r in rows_of("grass", 0.2, 0.01, part)]
    others = [
        r for name, noise in (("uniform", 0.01), ("remeasured", 0.2)) for r in rows_of(name, 0.0, noise, part)
    ]
    found = found_in([*rows, *of_task, *others], tmp_path)
    text = in_short(found)
    assert re.search(
        r"by log-loss\. `grass` is worse than `uniform`, \+0\.\d+ nats\. Undecided, detectable", text
    )
    least = found.families["relations"]["remeasured", "uniform"].log_loss.detectable
    assert re.search(rf"detectable {least:.2f} to {least:.2f}: `remeasured` - `uniform` [+-]0\.\d+\.\n", text)
    assert "A second task" not in in_short(found_in(rows, tmp_path))


def test_hours_and_edges_of_the_search_are_told(rows, tmp_path):
    text = " ".join(tables_page(found_in(rows, tmp_path)).split())
    assert f"The key contrast took {20 * len(rows) / 3600 / 2:.1f} hours on two cores" in text
    assert "edge of the search" not in page(found_in(rows, tmp_path))
    lower, lr = [], SEARCH.rates[0]
    while lr > SEARCH.rates[0] / SEARCH.factor:
        lr /= 2
        lower += [r | {"lr": lr} for r in rows if r["method"] == "full" and r["lr"] == SEARCH.rates[0]]
    for r in (*rows, *lower):
        if r["method"] == "full" and r["order"] in SEARCH.orders:
            r["log_loss"] = 1.0 + r["lr"]
    text = page(found_in([*rows, *lower], tmp_path))
    assert "The best rate lies at the edge of the search for full (arithmetic)." in text


def test_every_arm_has_a_title_or_a_reason_and_a_prediction():
    assert set(TITLES) >= {*KEY, *OTHERS, *FURTHER, *UNITS, *MODULES, *CONTROLS}
    assert set(NOTES) == {*RULES, *SETTINGS, *REMOVED, "grass-floor", *FURTHER, *CONTROLS}
    assert all(note.reason.endswith((".", "?")) and note.prediction for note in NOTES.values())
    for part, family in FAMILIES.values():
        assert {name for names in family for name in names} <= {*STUDY.parts[part].methods, *REMOVED}


@pytest.fixture
def project(tmp_path, rows, monkeypatch):
    """A folder with rows, their pages, and a README."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "results").mkdir()
    write_rows(tmp_path / "results" / "study.jsonl", rows)
    (tmp_path / "README.md").write_text(f"Before\n{BEGIN}\nold\n{END}\nAfter\n")
    monkeypatch.setattr(command, "ROOT", tmp_path)
    monkeypatch.setattr(command, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(command, "FIGURES", tmp_path / "figures")
    for name in ("_timeline", "_memory"):
        monkeypatch.setattr(figures, name, lambda path, *_: path.write_bytes(b"drawn by another command"))
    figures.draw_all(tmp_path / "results", tmp_path / "figures")
    assert command.main(["verify", "--write"]) == 0
    return tmp_path


def test_pages_that_were_written_are_as_the_rows_say(project, capsys):
    assert command.main(["verify"]) == 0
    assert capsys.readouterr().out.count("as the rows say") == 4
    readme = (project / "README.md").read_text()
    assert readme.startswith("Before\n")
    assert readme.endswith("After\n")
    assert "GRASS is better than uniform sampling" in readme
    assert "old" not in readme


@pytest.mark.parametrize(
    "name", ["docs/evidence.md", "docs/evidence-tables.md", "docs/evidence-log.md", "README.md"]
)
def test_a_change_by_hand_is_found(project, name, capsys):
    path = project / name
    text = path.read_text()
    by_hand = {"is better": "is worse", "| better |": "| worse |", "equal": "better"}
    changed = text
    for old, new in by_hand.items():
        changed = changed.replace(old, new)
    assert changed != text
    path.write_text(changed)
    assert command.main(["verify"]) == 1
    assert f"{path.name} is not what the rows say" in capsys.readouterr().err


def test_a_changed_row_is_found(project, rows, capsys):
    changed = next(r for r in rows if r["method"] == "grass" and r["order"] == 0)
    changed["log_loss"] += 0.05
    write_rows(project / "results" / "study.jsonl", rows)
    assert command.main(["verify"]) == 1
    assert "is not what the rows say" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["losses.png", "memory.png"])
def test_a_changed_figure_is_found(project, name, capsys):
    path = project / "figures" / name
    path.write_bytes(path.read_bytes() + b"by hand")
    assert command.main(["verify"]) == 1
    assert f"{name} is not as it was drawn" in capsys.readouterr().err


def test_a_figure_of_other_rows_is_found(project, rows, capsys):
    """Of a part that no page mentions, such as the curve of a run."""
    rows[-1]["curve"] = [9.0] * 10
    write_rows(project / "results" / "study.jsonl", rows)
    assert command.main(["verify"]) == 1
    assert "its rows have changed" in capsys.readouterr().err


def test_a_figure_that_the_manifest_does_not_list_is_found(project, capsys):
    """Its entry was deleted, so that nothing is compared."""
    path = project / "figures" / figures.MANIFEST
    manifest = json.loads(path.read_text())
    del manifest["losses.png"]
    path.write_text(json.dumps(manifest))
    assert command.main(["verify"]) == 1
    assert "does not list losses.png" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["docs/evidence.md", "docs/evidence-tables.md", "README.md"])
def test_a_number_changed_by_hand_is_found(project, name, capsys):
    """The first, one in the middle, and the last, by the last digit."""
    path = project / name
    text = path.read_text()
    numbers = [found.start() for found in re.finditer(r"\d(?= nats|\])", text)]
    assert numbers
    for place in (numbers[0], numbers[len(numbers) // 2], numbers[-1]):
        path.write_text(text[:place] + str((int(text[place]) + 1) % 10) + text[place + 1 :])
        assert command.main(["verify"]) == 1
        assert f"{path.name} is not what the rows say" in capsys.readouterr().err


def test_figures_that_were_never_drawn_are_missed(project, capsys):
    (project / "figures" / figures.MANIFEST).unlink()
    assert command.main(["verify"]) == 1
    assert "run python -m bench.quality figures" in capsys.readouterr().err


def test_a_readme_without_its_part_is_refused(project):
    (project / "README.md").write_text("nothing")
    with pytest.raises(GrassError, match=r"README\.md has no part between"):
        written_pages(project / "results", project)


# -- figures ---------------------------------------------------------------------------------------------


def test_every_figure_is_drawn_from_its_rows(tmp_path, rows, measured, monkeypatch):
    pytest.importorskip("matplotlib", reason="figures are drawn by it")
    for name in ("_timeline", "_memory"):
        monkeypatch.setattr(figures, name, lambda path, *_: path.write_bytes(b"drawn by another command"))
    folder = tmp_path / "rows"
    folder.mkdir()
    assert {path.name for path in figures.draw_all(folder, tmp_path / "none")} == {
        "timeline.png",
        "memory.png",
    }
    write_rows(folder / "study.jsonl", rows)
    write_rows(folder / "stability.jsonl", measured)
    norms = [{"panel": "arithmetic", "name": name, "norms": [1.0, 2.0, 4.0]} for name in ("AddSub", "gsm8k")]
    write_rows(folder / "norms.jsonl", norms)
    paths = figures.draw_all(folder, tmp_path / "all")
    names = {"timeline", "memory", "losses", "differences", "norms-small", "norms"}
    assert {path.name for path in paths} == {f"{name}.png" for name in names}
    assert all(path.stat().st_size > 0 for path in paths)


def test_figures_show_what_the_rows_say(rows, monkeypatch, tmp_path):
    """Another method's values, or another sign."""
    pytest.importorskip("matplotlib", reason="figures are drawn by it")
    drawn = []
    monkeypatch.setattr(figures, "_save", lambda figure, path, title: drawn.append(figure))
    figures.draw_differences(rows, tmp_path / "differences.png")
    left, right = drawn[0].axes
    labels = [label.get_text() for label in left.get_yticklabels()]
    expected = {f"{a} - {b} (4 bases)": of for (a, b), of in across(rows).items()}
    assert len(expected) == 3
    assert labels[0] == "grass - uniform (4 bases)"  # the best
    for place, label in enumerate(labels):
        for axes, of in zip((left, right), expected[label], strict=True):
            span, mean = axes.lines[2 * place : 2 * place + 2]
            assert list(span.get_xdata()) == [of.difference.low, of.difference.high]
            assert list(mean.get_xdata()) == [of.difference.mean]
            assert (mean.get_markerfacecolor() == "white") == (of.verdict == "undecided")
    for r in rows:
        r["curve"] = [
            {"full": 1.0, "uniform": 3.0, "static": 2.0, "grass": 2.5}[r["method"]] + r["order"] / 100
        ] * 10
    figures.draw_losses(rows, tmp_path / "losses.png")
    means, below = ({line.get_label(): line.get_ydata()[0] for line in axes.lines} for axes in drawn[1].axes)
    assert means == pytest.approx({"full": 1.035, "uniform": 3.035, "static": 2.035, "grass": 2.535})
    assert below == pytest.approx({"full": -2.0, "uniform": 0.0, "static": -1.0, "grass": -0.5})


def test_the_page_of_this_checkout_is_that_of_its_rows():
    pages = written_pages(command.RESULTS, command.ROOT)
    for path, text in pages.items():
        assert path.read_text(encoding="utf-8") == text, (
            f"run python -m bench.quality verify --write ({path})"
        )
    assert "evidence.md" in {path.name for path in pages}
    figures.check_figures(command.RESULTS, command.FIGURES)


def test_the_page_is_written_with_all_rows(tmp_path, rows, measured):
    """With every part and both tables nothing is left to run."""
    for part in STUDY.parts.values():
        methods = {*part.methods, *map(rate_of, part.methods)}
        rows = rows + [r for name in sorted(methods) for r in rows_of(name, 0.0, 0.02, part)]
    rows = list({(r["task"], r["method"], r["lr"], r["base"], r["order"]): r for r in rows}.values())
    removed = [r for name in REMOVED for r in rows_of(name, 0.0, 0.02, STUDY.parts["confirmation"])]
    write_rows(tmp_path / "study.jsonl", [*rows, *removed])
    enough = [r | {"norms": r["norms"] * 10} if r["kind"] == "norms" else r for r in measured]
    write_rows(tmp_path / "stability.jsonl", enough)
    methods = ("full", "lisa", "lora-r128", "grass", "grass-resident", "grass-streamed")
    write_rows(tmp_path / "memory.jsonl", [{"method": name, "peak_gib": 20.0} for name in methods])
    norms = {"panel": "arithmetic, while training", "norms": [1.0, 2.0]}
    write_rows(tmp_path / "norms.jsonl", [norms | {"name": f"step {step}"} for step in real.STAGES])
    for table in real.TASKS:
        losses = {method: [0.5, 0.6, 0.7] for method in real.METHODS[table]}
        write_real(tmp_path, table, losses)
    found = Found.of(tmp_path)
    text = page(found) + tables_page(found) + log_page(found)
    assert "not run" not in text.lower()
    assert "not predicted yet" not in text.lower()
    assert "nan" not in text


def test_a_study_is_run_and_summarized(tmp_path, capsys, monkeypatch):
    """The command; its runs are made up."""

    def run_missing(jobs, run_job, path, workers, seconds):
        while found := jobs(read_rows(path)):
            new = row(found[0], 1.0 + (found[0].lr != BEST)) | asdict(SMALL.budgets[found[0].task])
            write_rows(path, [*read_rows(path), new])
            yield new, len(found) - 1

    monkeypatch.setattr(command, "run_missing", run_missing)
    monkeypatch.setattr(command, "ROWS", tmp_path / "study.jsonl")
    arguments = ["run", "--bases", str(tmp_path / "bases"), "--small"]
    assert command.main([*arguments, "--part", "relations"]) == 2
    assert "--small has no part relations: choose of key, rules" in capsys.readouterr().err
    assert command.main([*arguments, "--part", "rules"]) == 0
    assert "shuffled" not in capsys.readouterr().out
    assert command.main(arguments) == 0
    out = capsys.readouterr().out
    assert "arithmetic, 2 bases x 2 orders: held-out log-loss, exact match" in out
    assert re.search(r"\nshuffled +1\.0000  50\.0%  4 runs at 0\.004\n", out)
    assert {r["order"] for r in read_rows(tmp_path / "small.jsonl")} == {0, 1, *SEARCH.orders}
