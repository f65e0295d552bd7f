"""Rows as text: the task, and measured beside simulated."""

from collections.abc import Sequence

from bench.offload.rows import Row

HEAD = (
    f"{'':<12} {'measured ms':>12} {'simulated ms':>13} {'floor ms':>9} {'above':>7} {'bound ms':>9} {'above':>7} "
    f"{'exposed ms':>11} {'hidden':>7}"
)
LEGEND = (
    "floor: no schedule of the same operations is faster: the longest of compute, copies in, copies out.\n"
    "bound: no order of copies through this ring is: gradients come when they do, and the next forward waits for all\n"
    "updates. Copies of the last gradients of backward cannot be hidden: mostly those of the lowest layers\n"
    "(--layer-indices 0,1).\n"
    "exposed: nothing is computed. hidden: the share of the copies' own time that lies behind compute.\n"
    "The figures from floor on are of what was measured, if anything was."
)


def lines_of(rows: Sequence[Row]) -> list[str]:
    """The table of a run."""
    first = rows[0]
    layers = ", ".join(map(str, first["active_layers"]))
    gb = [first[f"{way}_bytes_per_second"] / 1e9 for way in ("h2d", "d2h")]
    shared = f"{100 * first['duplex_factor']:.0f} % of it each while both copy"
    lines = [
        f"{first['model']}: layers {layers} and what is in no layer, {first['tokens']} tokens at "
        f"{first['flops'] / 1e12:g} TFLOP/s",
        f"float32 moments in {first['buffer_count']} buffers of {first['buffer_bytes'] / 2**20:g} MiB",
        f"link: {gb[0]:.1f} GB/s in, {gb[1]:.1f} GB/s out, {shared} "
        f"({'measured' if first['link_measured'] else 'given'})",
        f"updates at {first['hbm_bytes_per_second'] / 1e12:.2g} TB/s of device memory, "
        f"{1e6 * first['hop_seconds']:.3g} us from a stream to the next",
        "",
        HEAD,
    ]
    for variant in dict.fromkeys(row["variant"] for row in rows):
        by_source = {row["source"]: row for row in rows if row["variant"] == variant}
        lines.append(_line(variant, by_source["device"], by_source["simulation"]))
    lines += ["", LEGEND]
    if not any(row["measured"] for row in rows):
        lines += ["", f"not measured: {first['reason']}; this is the simulation alone"]
    return lines


def _line(variant: str, device: Row, simulation: Row) -> str:
    shown = device if device["measured"] else simulation
    cells = [
        f"{variant:<12}",
        f"{_ms(device['seconds']):>12}",
        f"{_ms(simulation['seconds']):>13}",
        f"{_ms(shown['floor_seconds']):>9}",
        f"{100 * shown['above_floor']:>5.1f} %",
        f"{_ms(shown['bound_seconds']):>9}",
        f"{100 * shown['above_bound']:>5.1f} %",
        f"{_ms(shown['exposed_seconds']):>11}",
        f"{100 * shown['hidden_share']:>5.0f} %",
    ]
    return " ".join(cells)


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e3 * seconds:.1f}"
