"""Results of a finished run, and the table that shows them."""

from collections.abc import Sequence
from textwrap import wrap
from typing import Any

from grass.config import GrassConfig
from grass.finetune.options import FinetuneOptions
from grass.layers import LayerMap

_WIDTH = 100  # of the table, in characters


def trained_share(rows: Sequence[dict[str, Any]], steps: int, num_params: int) -> float:
    """Return the fraction of the parameters that is trained in a step, averaged over the steps after the probe.

    Args:
        rows: rows of layers.jsonl.
        steps: number of steps of the run.
        num_params: number of elements of the model.
    """
    ends = [row["step"] for row in rows[1:]] + [steps]
    spans = [
        (end - row["step"], row["trained_params"])
        for row, end in zip(rows, ends, strict=True)
        if row["phase"] != "probe"
    ]
    adapt_steps = sum(length for length, _ in spans)
    return sum(length * params for length, params in spans) / max(1, adapt_steps * num_params)


def make_results(
    options: FinetuneOptions,
    config: GrassConfig,
    layers: LayerMap | None,
    num_params: int,
    training: dict[str, Any],
    rows: Sequence[dict[str, Any]],
    before: dict[str, Any],
    after: dict[str, Any],
    path: str,
) -> dict[str, Any]:
    """Return the values of the table by name, as ``--json`` prints them.

    Args:
        options, config: options of the run, configuration of the method.
        layers: layer map of the model; None for full fine-tuning.
        num_params: number of elements of the model.
        training: a `TrainingSummary` as a dictionary.
        rows: rows of layers.jsonl.
        before, after: results of the evaluations; empty without held-out records.
        path: path of the run folder.
    """
    sampled = layers is not None
    return {
        "run": path,
        "model": f"{path}/model",
        "method": options.method,
        "sampler": config.sampler if sampled else None,
        "seed": config.seed,
        "steps": training["steps"],
        "layers": len(layers) if layers is not None else None,
        "active_layers": config.active_layers if sampled else None,
        "num_params": num_params,
        "heldout_loss_before": before.get("heldout_loss"),
        "heldout_loss_after": after.get("heldout_loss"),
        "accuracy_before": before.get("accuracy"),
        "accuracy_after": after.get("accuracy"),
        "accuracy_by_source_before": before.get("accuracy_by_source"),
        "accuracy_by_source_after": after.get("accuracy_by_source"),
        "answers": after.get("answers"),
        "scoring": after.get("scoring"),
        "trained_share": trained_share(rows, training["steps"], num_params) if sampled else 1.0,
        "optimizer_state_bytes": training["optimizer_state_bytes"],
        "optimizer_state_bytes_active": training["optimizer_state_bytes_active"],
        "tokens_per_second": training["tokens_per_second"],
        "training_seconds": training["seconds"],
        "peak_device_bytes": training["peak_device_bytes"],
        "peak_host_bytes": training["peak_host_bytes"],
        "best_step": training["best_step"],
        "draw_counts": training["draw_counts"],
        "nonfinite_norms": training["nonfinite_norms"],
    }


def format_table(results: dict[str, Any]) -> str:
    """Format the results as a table, with a sample before and after training if there is one."""
    r = results
    lines = [(_method(r), "before", "after", "")]
    if r["heldout_loss_after"] is not None:
        before, after = r["heldout_loss_before"], r["heldout_loss_after"]
        lines.append(("held-out loss", f"{before:.3f}", f"{after:.3f}", ""))
    if r["accuracy_after"] is not None:
        before, after = r["accuracy_before"], r["accuracy_after"]
        note = f"{r['answers']} answers by {', '.join(r['scoring'])}"
        lines.append(("held-out accuracy", f"{before:.1%}", f"{after:.1%}", note))
    for source, accuracy in (r["accuracy_by_source_after"] or {}).items():
        name = f"  {source if len(source) < 33 else '...' + source[-30:]}"
        lines.append((name, f"{r['accuracy_by_source_before'][source]:.1%}", f"{accuracy:.1%}", ""))
    if len(lines) == 1:
        lines = [(_method(r), "", "", "")]
    state = f"{_bytes(r['optimizer_state_bytes_active'])} active at a time"
    facts = [
        ("trained per step", f"{r['trained_share']:.1%}", f"of {r['num_params']:,} parameters"),
        ("optimizer state", _bytes(r["optimizer_state_bytes"]), state if r["draw_counts"] else ""),
        ("speed", f"{r['tokens_per_second']:,.0f}", "tokens per second"),
        ("time", _duration(r["training_seconds"]), "in training"),
        ("peak memory", _bytes(r["peak_host_bytes"]), "on the host"),
    ]
    if r["peak_device_bytes"] is not None:
        facts.append(("", _bytes(r["peak_device_bytes"]), "on the device, in training"))
    if r["best_step"] is not None:
        facts.append(("weights of step", f"{r['best_step']:,}", "the best of the checkpoints"))
    lines += [(name, "", value, note) for name, value, note in facts]
    head = max(len(line[0]) for line in lines) + 2
    table = [f"{a:<{head}}{b:>9}{c:>11}   {d}".rstrip() for a, b, c, d in lines]
    if r["draw_counts"]:
        counts = "  ".join(f"{i}:{n}" for i, n in enumerate(r["draw_counts"]))
        table += wrap(f"{'draws by layer':<{head}}  {counts}", _WIDTH, subsequent_indent=" " * (head + 2))
    if r["nonfinite_norms"]:
        table.append(f"gradient norms that were NaN or inf and were left out: {r['nonfinite_norms']}")
    for sample in r.get("samples", ())[:1]:
        table.append("")
        for name, text in sample.items():
            indent = " " * (head + 2)
            rows = wrap(text, _WIDTH, initial_indent=f"{name:<{head}}  ", subsequent_indent=indent)
            table += [*rows[:3], f"{indent}..."] if len(rows) > 4 else rows
    return "\n".join(table)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _method(r: dict[str, Any]) -> str:
    if r["method"] == "full":
        return f"full fine-tuning, {r['steps']:,} steps"
    return f"GRASS, {r['sampler']}, {r['active_layers']} of {r['layers']} layers, {r['steps']:,} steps"


def _bytes(count: int) -> str:
    value = float(count)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} GB"
