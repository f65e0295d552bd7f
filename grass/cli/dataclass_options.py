"""Command-line options made from a dataclass, so that the two cannot drift apart.

A field ``sample_interval: int = 25`` with the docstring entry ``sample_interval: T_s, steps ...`` becomes
``--sample-interval N`` with that text and its default as help. Options that are not given stay out of the
result: the defaults are the dataclass's own.
"""

import argparse
import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

from grass.cli.values import comma_list


def argument_docs(cls: type) -> dict[str, str]:
    """Return the text of each entry under ``Args:`` in a class's docstring, on one line."""
    doc = inspect.getdoc(cls) or ""
    section = re.search(r"^Args:\n((?:[ \t]+.*\n|\n)+)", doc + "\n", re.MULTILINE)
    if section is None:
        return {}
    entries = re.split(r"^ {4}(?=\S)", section[1], flags=re.MULTILINE)
    pairs = (entry.split(":", 1) for entry in entries if ":" in entry)
    return {name.strip(): " ".join(text.split()) for name, text in pairs}


def add_dataclass_options(
    parser: argparse.ArgumentParser,
    title: str,
    cls: type,
    other_help: Mapping[str, str] | None = None,
    types: Mapping[str, Callable[[str], Any]] | None = None,
) -> None:
    """Add a group with an option for each field of a dataclass.

    Args:
        parser: parser that the group is added to.
        title: of the group.
        cls: the dataclass; fields of type int, float, str, bool, optional ones, and lists of str
            (given with commas, or by giving the option several times).
        other_help: texts to show in place of the docstring's, by field.
        types: converters of values, by field.
    """
    group = parser.add_argument_group(title)
    docs = {**argument_docs(cls), **(other_help or {})}
    for field in dataclasses.fields(cls):
        shown = docs.get(field.name, "").replace("``", "").replace("%", "%%")
        if field.default not in (None, "", dataclasses.MISSING) and field.default is not False:
            shown = f"{shown.rstrip('.')} [{field.default}]"
        flag = "--" + field.name.replace("_", "-")
        kind, is_list = _kind(field.type)
        if kind is bool:
            group.add_argument(
                flag, default=argparse.SUPPRESS, action=argparse.BooleanOptionalAction, help=shown
            )
            continue
        group.add_argument(
            flag,
            default=argparse.SUPPRESS,
            action="extend" if is_list else "store",
            type=comma_list if is_list else (types or {}).get(field.name, kind),
            metavar={int: "N", float: "X"}.get(kind, field.name.split("_")[-1].upper()),
            help=shown,
        )


def given_options(namespace: argparse.Namespace, cls: type) -> dict[str, Any]:
    """Return the values given for the fields of a dataclass. A list of one is its element."""
    names = {field.name for field in dataclasses.fields(cls)}
    given = {name: value for name, value in vars(namespace).items() if name in names}
    return {
        name: value if not isinstance(value, list) else tuple(value) if len(value) > 1 else value[0]
        for name, value in given.items()
    }


def _kind(annotation: Any) -> tuple[type, bool]:
    """Return the type of a single value, and True if a list of them may be given."""
    if typing.get_origin(annotation) is typing.Literal:  # checked by the dataclass itself
        return type(typing.get_args(annotation)[0]), False
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        members = [m for m in typing.get_args(annotation) if m is not type(None)]
        return members[0], len(members) > 1
    return annotation, False
