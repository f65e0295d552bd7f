"""What the page says of the host's cost. Failures these tests catch: a target met that was missed; a ratio to another
situation's unit, to another number of tensors or across runs; a variant whose cost is not shown.
"""

from bench.host import subjects
from bench.report import UNMEASURED
from bench.report_host import VARIANTS
from tests.support.pages import host_row, lines_of, page_of, write_rows, write_run


def test_what_a_step_costs_the_host(tmp_path):
    rows = [
        host_row(291, "addresses", 10e-6),
        host_row(291, "grass", 29e-6),
        host_row(291, "torch fused", 29e-6),
        host_row(5000, "addresses", 5000 * 30e-9),
        host_row(5000, "grass", 5000 * 96e-9),
    ]
    write_run(tmp_path, "a", rows, tests_passed=None)
    page = page_of(tmp_path)
    assert lines_of(page, "291 tensors, in place", "addresses") == [
        ["<= 3x", "2.90x (29 us)", "-", "met", "1"]
    ]
    assert lines_of(page, "291 tensors, in place", "torch fused's time")[0][1:] == [
        "1.000x (29 us)", "-", "**missed**", "1",
    ]  # fmt: skip
    assert lines_of(page, "5000 tensors, in place") == [
        ["<= 3x", "3.20x (96 ns a tensor, of 291: 100)", "-", "**missed**", "1"]
    ]
    assert lines_of(page, "5000 tensors, lr changes")[0][1] == UNMEASURED
    assert lines_of(page, "291 tensors, lr changes", "addresses")[0][1] == UNMEASURED
    assert "No GPU has been measured yet" in page


def test_the_host_cost_of_every_variant_is_shown(tmp_path):
    """Each by the unit of its own situation and number of tensors; the target is the default's alone."""
    seconds = {"addresses": 10.0, "grass": 29.0, "grass clipping": 30.01, "grass exact bf16": 45.0}
    moved = {"addresses": 20.0, "grass": 80.0, "torch fused": 400.0}
    many = {"addresses": 100.0, "grass": 310.0, "grass clipping": 320.0}
    rows = [
        *(host_row(291, name, 1e-6 * s) for name, s in seconds.items()),
        *(host_row(291, name, 1e-6 * s, "gradients move") for name, s in moved.items()),
        *(host_row(5000, name, 1e-6 * s) for name, s in many.items()),
    ]
    write_rows(tmp_path, "a", rows)
    page = page_of(tmp_path)
    head = (
        "tensors | situation | unit | grass | grass clipping | grass exact bf16 | torch fused | grass: <= 3x"
    )
    table = page.split(f"| {head} |\n")[1].split("\n\n")[0].splitlines()
    assert table[1:] == [
        "| 291 | in place | 10 us | 2.90x | 3.001x | 4.50x | - | met |",
        "| 291 | gradients move | 20 us | 4.00x | - | - | 20.00x | **missed** |",
        "| 5000 | in place | 100 us | 3.10x | 3.20x | - | - | **missed** |",
    ]
    assert "against `grass`, each situation by itself" in page


def test_host_tables_do_not_mix_runs(tmp_path):
    write_rows(tmp_path, "a", [host_row(291, "addresses", 10e-6), host_row(291, "grass", 20e-6)])
    write_rows(tmp_path, "b", [host_row(291, "addresses", 10e-6), host_row(291, "grass", 25e-6)])
    write_rows(tmp_path, "c", [host_row(291, "grass", 25e-6)])  # without a unit
    page = page_of(tmp_path)
    assert page.count("| tensors | situation |") == 2
    assert page.index("Run 1, by the unit") < page.index("| 2.00x |")
    assert page.index("| 2.00x |") < page.index("Run 2, by the unit") < page.index("| 2.50x |")
    assert "Run 3, by the unit" not in page


def test_the_host_table_s_variants_are_those_that_are_measured():
    others = {"addresses", "torch foreach", "torch single"}  # the unit, and loops that no figure is about
    assert set(VARIANTS) == set(subjects(2)) - others
