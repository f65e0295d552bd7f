"""The table of a reproduction, beside that of the paper."""

from collections.abc import Sequence
from statistics import mean, stdev
from typing import Any

from grass.finetune.options import as_tuple
from grass.reproduce.options import ReproduceOptions
from grass.reproduce.study import Row
from grass.reproduce.tables import PAPER_MODELS, TABLES


def make_report(rows: Sequence[Row], options: ReproduceOptions) -> dict[str, Any]:
    """Return the results of a reproduction, which may be unfinished.

    Args:
        rows: finished runs.
        options: what is reproduced.

    Returns:
        Table, model, `eval_limit`, and for each method its learning rate, number of runs, means and standard
        deviations (None with fewer than two) of log-loss and average accuracy, accuracy of each task, and the paper's
        averages; what has not been run is None.
    """
    methods = {}
    for method in as_tuple(options.methods):
        lr, own = results_of(rows, options, method)
        finished = [row for row in own if row["log_loss"] is not None]
        tasks = list(finished[0]["accuracies"]) if finished else []
        averages = [mean(row["accuracies"].values()) for row in finished]
        paper = TABLES[options.table].paper.get(method)
        methods[method] = {
            "lr": lr,
            "runs": len(own),
            "diverged": len(own) - len(finished),
            "log_loss": _mean([row["log_loss"] for row in finished]),
            "log_loss_deviation": _deviation([row["log_loss"] for row in finished]),
            "accuracy": _mean(averages),
            "accuracy_deviation": _deviation(averages),
            "accuracies": {task: mean(row["accuracies"][task] for row in finished) for task in tasks},
            "paper": None if paper is None else dict(zip(PAPER_MODELS, paper, strict=True)),
        }
    return {
        "table": options.table,
        "model": options.base,
        "eval_limit": options.eval_limit,
        "methods": methods,
    }


def results_of(rows: Sequence[Row], options: ReproduceOptions, method: str) -> tuple[float | None, list[Row]]:
    """Return the learning rate of a method, None before it is chosen, and a row for each of its results."""
    lr, _ = options.search.next_rates(rows, options.table, method, [options.base])
    own = {
        (row["base"], row["order"]): row
        for row in rows
        if (row["task"], row["method"], row["lr"]) == (options.table, method, lr)
        and (row["base"], row["order"]) in options.pairs
    }
    return lr, list(own.values())


def format_report(report: dict[str, Any]) -> str:
    """Return a report as a table of text: accuracies in percent, mean ± standard deviation over orders of the data."""
    tasks = list(dict.fromkeys(task for of in report["methods"].values() for task in of["accuracies"]))
    header = ["method", "lr", "runs", "log-loss", *tasks, "average", *PAPER_MODELS]
    lines = [header]
    for method, of in report["methods"].items():
        lines.append(
            [
                method,
                "" if of["lr"] is None else f"{of['lr']:g}",
                str(of["runs"]) + (f" ({of['diverged']} diverged)" if of["diverged"] else ""),
                plus_minus(of["log_loss"], of["log_loss_deviation"], 4),
                *(_percent(of["accuracies"].get(task)) for task in tasks),
                plus_minus(_scaled(of["accuracy"]), _scaled(of["accuracy_deviation"]), 2),
                *(
                    "" if of["paper"] is None else f"{value:.2f}"
                    for value in (of["paper"] or dict.fromkeys(PAPER_MODELS)).values()
                ),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]
    note = (
        f"{report['table']} on {report['model']}, by greedy decoding, at most {report['eval_limit']:,} records a task "
        f"(--eval-limit); the last {len(PAPER_MODELS)} columns are the paper's averages, "
        f"of {len(TABLES[report['table']].tasks)} tasks"
    )
    return "\n".join([note, "", *text])


def _mean(values: Sequence[float]) -> float | None:
    return mean(values) if values else None


def _deviation(values: Sequence[float]) -> float | None:
    return stdev(values) if len(values) > 1 else None


def _scaled(value: float | None) -> float | None:
    return None if value is None else 100 * value


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def plus_minus(value: float | None, deviation: float | None, digits: int) -> str:
    """Return a mean with its standard deviation; empty if there is no mean."""
    if value is None:
        return ""
    return f"{value:.{digits}f}" + ("" if deviation is None else f" ± {deviation:.{digits}f}")
