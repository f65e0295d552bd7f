"""`grass layers MODEL`: the layer map of a model with sizes, from its configuration alone."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from grass.cli.values import MissingPackageError, UsageError, comma_list, model_or_preset
from grass.errors import LayerDiscoveryError, ModelError, first_line
from grass.hub import check_hub
from grass.plan import is_preset, preset_names

if TYPE_CHECKING:
    from torch import nn

    from grass.layers import LayerMap


def add_parser(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "layers",
        help="show which parameters form which layer, and what is outside",
        description="Show the layers that GRASS would sample, their sizes, and what is outside of them. "
        "The model is built from its configuration; no weights are loaded.",
    )
    parser.add_argument(
        "model",
        type=model_or_preset,
        metavar="MODEL",
        help=f"a folder with a config.json, or a name on the hub; or one of {', '.join(preset_names())}",
    )
    parser.add_argument(
        "--pattern",
        action="extend",
        type=comma_list,
        help="module paths of the layers, such as 'model.layers.*', one for each stack; found when not given",
    )
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the layer map, and return the exit code."""
    from grass.layers import LayerMap

    model = build_without_weights(args.model)
    try:
        layers = LayerMap.from_model(model, args.pattern)
    except LayerDiscoveryError as error:
        if args.pattern:
            raise UsageError(f"--pattern {','.join(args.pattern)}: {error}") from None
        raise LayerDiscoveryError(f"{error}\nHere: --pattern 'PATH.*', one for each stack") from None
    described = describe(args.model, model, layers)
    print(json.dumps(described, indent=2) if args.json else table(described))
    return 0


def build_without_weights(name: str) -> nn.Module:
    """Return the model of a folder, hub name or preset on the meta device.

    It is of the class that trains it as a language model.

    Raises:
        MissingPackageError: transformers is not installed.
        ModelError: there is no configuration, or it builds nothing.
    """
    import torch

    try:
        import transformers
    except ImportError:
        raise MissingPackageError(
            "transformers is not installed: pip install grass-optim[transformers]"
        ) from None
    if is_preset(name):
        from grass.plan.models import configuration

        config = configuration(name)
    else:
        check_hub(name)
        try:
            config = transformers.AutoConfig.from_pretrained(name)
        except Exception as error:  # a damaged one may raise anything
            raise ModelError(f"no configuration for {name!r}: {first_line(error)}") from error

    # An encoder-decoder is also registered as causal, without its encoder.
    autos = [transformers.AutoModelForCausalLM, transformers.AutoModelForSeq2SeqLM]
    if getattr(config, "is_encoder_decoder", False):
        autos.reverse()
    autos += [transformers.AutoModelForImageTextToText, transformers.AutoModelForSpeechSeq2Seq]
    known: list[Any] = [auto for auto in autos if type(config) in auto._model_mapping]  # type: ignore[operator]
    auto = known[0] if known else transformers.AutoModel
    try:
        with torch.device("meta"):
            return auto.from_config(config)
    except Exception as error:  # a model's constructor may raise anything
        raise ModelError(f"{name} cannot be built: {type(error).__name__}: {first_line(error)}") from error


def describe(name: str, model: nn.Module, layers: LayerMap) -> dict[str, Any]:
    """Return the map in plain numbers and strings; the outside by the largest modules without a layer."""
    total = sum(layers.num_params) + layers.outside_num_params
    tied: dict[str, list[str]] = {}
    for other, parameter in layers.tied:
        tied.setdefault(parameter, []).append(other)

    outside: dict[str, dict[str, Any]] = {}
    sizes = {parameter_name: parameter.numel() for parameter_name, parameter, _ in layers.assign(model)}
    for parameter in layers.outside:
        path = _largest_module_outside(parameter, layers)
        row = outside.setdefault(path, {"path": path, "num_params": 0, "share": 0.0, "tied_with": []})
        row["num_params"] += sizes[parameter]
        row["share"] = row["num_params"] / total
        others = [_largest_module_outside(other, layers) for other in tied.get(parameter, ())]
        row["tied_with"] += [other for other in others if other not in (path, *row["tied_with"])]
    return {
        "model": name,
        "class": type(model).__name__,
        "num_params": total,
        "layers": [
            {"index": index, "path": path, "num_params": size, "share": size / total}
            for index, (path, size) in enumerate(zip(layers.names, layers.num_params, strict=True))
        ],
        "layers_num_params": sum(layers.num_params),
        "outside": list(outside.values()),
        "outside_num_params": layers.outside_num_params,
    }


def _largest_module_outside(parameter: str, layers: LayerMap) -> str:
    from grass.layer_stacks import is_under

    parts = parameter.split(".")
    for depth in range(1, len(parts)):
        path = ".".join(parts[:depth])
        if not any(is_under(layer, path) for layer in layers.names):
            return path
    return parameter


def table(described: dict[str, Any]) -> str:
    """Format the map in aligned columns: layers, their sum, the outside, its sum, the total."""
    total = described["num_params"]
    inside, beyond = described["layers_num_params"], described["outside_num_params"]
    head = ("layer", "path", "parameters", "share", "")
    layers = [(str(row["index"]), row["path"], row["num_params"], "") for row in described["layers"]]
    outside = [("", row["path"], row["num_params"], _tied(row["tied_with"])) for row in described["outside"]]
    count = len(layers)
    sections = [
        [*layers, ("", f"{count} layer{'s' * (count > 1)}", inside, "")],
        [*outside, ("", "outside", beyond, "")],
        [("", "total", total, "")],
    ]
    rows = [head]
    for section in sections:
        rows += [
            (index, path, human(size), f"{size / total:.1%}", note) for index, path, size, note in section
        ]
        rows.append(("", "", "", "", ""))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [
        f"{row[0]:>{widths[0]}}  {row[1]:<{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]:>{widths[3]}}  {row[4]}"
        for row in rows[:-1]
    ]
    return "\n".join([f"{described['model']} ({described['class']})", "", *(line.rstrip() for line in lines)])


def human(number: int) -> str:
    """Format a count with three significant digits and a unit: 950, 12.3 K, 202 M, 6.74 B."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        scaled = number / size
        if scaled >= 0.9995:  # what rounds to 1.00 of a unit takes that unit
            digits = 2 if scaled < 9.995 else 1 if scaled < 99.95 else 0
            return f"{scaled:.{digits}f} {unit}"
    return str(number)


def _tied(others: list[str]) -> str:
    if not others:
        return ""
    more = f" and {len(others) - 1} more" if len(others) > 1 else ""
    return f"tied with {others[0]}{more}"
