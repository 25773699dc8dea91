"""Hardware described in TOML: read with every key checked, and written.

::

    name = "lab"
    platform = "gpu"
    chip = "h200"                       # or a table with the fields of `fabric.Chip`
    order = ["node:2", "gpu:4"]         # parts of a device id, outermost first

    [[fabrics]]                         # innermost first; fields of `fabric.Fabric`
    name = "nvlink"
    kind = "crossbar"
    shape = [4]
    gbps = 450
    latency_us = 1

    [[fabrics]]
    name = "ethernet"
    kind = "crossbar"
    shape = [0]                         # joins as many as there are
    gbps = 12.5
    latency_us = 20
"""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sharding.fabric import Chip, Fabric
from sharding.hardware import DIE_910C, GENERATIONS, GPUS
from sharding.topology import Topology

CHIPS = {**{k: g.chip for k, g in GENERATIONS.items()}, **GPUS, "910c": DIE_910C}
"""Chips that a file may name instead of describing."""


class DescriptionError(ValueError):
    """A file that does not describe a topology; the message says where and what to write."""


def load(path: str | Path) -> Topology:
    """A topology from a TOML file.

    Raises:
        DescriptionError: no TOML, a key that is unknown, missing or of the wrong type, or values
            that contradict each other.
    """
    return parse(Path(path).read_text(), str(path))


def parse(text: str, source: str = "description") -> Topology:
    """A topology from TOML text; `source` is what errors call it."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise DescriptionError(f"{source}: no TOML: {error}") from error
    try:
        table = dict(table)
        if "chip" in table:
            table["chip"] = _chip(table["chip"], f"{source}: chip")
        if "fabrics" in table:
            fabrics = _typed(table["fabrics"], list, f"{source}: fabrics")
            table["fabrics"] = tuple(
                _build(Fabric, entry, f"{source}: fabrics[{i}]") for i, entry in enumerate(fabrics)
            )
        return _build(Topology, table, source)
    except DescriptionError:
        raise
    except ValueError as error:
        raise DescriptionError(f"{source}: {error}") from error


def dump(topology: Topology) -> str:
    """The TOML that `parse` makes the same topology of."""
    lines = _lines(topology, skip=("chip", "fabrics"))
    lines += ["", "[chip]", *_lines(topology.chip)]
    for fabric in topology.fabrics:
        lines += ["", "[[fabrics]]", *_lines(fabric)]
    return "\n".join(lines) + "\n"


def _lines(value: Any, skip: tuple[str, ...] = ()) -> list[str]:
    fields = [f for f in dataclasses.fields(value) if f.name not in skip]
    pairs = [(f.name, getattr(value, f.name)) for f in fields]
    return [f"{name} = {_toml(x)}" for name, x in pairs if x is not None]


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return f'"{escaped}"'
    return repr(value)


def _chip(value: Any, where: str) -> Chip:
    if not isinstance(value, str):
        return _build(Chip, value, where)
    if value not in CHIPS:
        raise DescriptionError(f"{where}={value!r}: {_suggest(value, CHIPS)}")
    return CHIPS[value]


def _build(cls: type, table: Any, where: str) -> Any:
    """An instance of a dataclass from a table, every key checked."""
    table = _typed(table, dict, where)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in table:
        if key not in fields:
            raise DescriptionError(f"{where}: no key {key!r}; {_suggest(key, fields)}")
    needed = [name for name, f in fields.items() if f.default is dataclasses.MISSING]
    # A rate that nobody knows is left out, as in what `dump` writes.
    absent = dict.fromkeys(name for name in needed if name not in table)
    if missing := [name for name in absent if "None" not in str(fields[name].type)]:
        raise DescriptionError(f"{where}: {', '.join(missing)} must be given")
    read = {name: _READ[str(fields[name].type)] for name in table}
    return cls(**absent, **{k: read[k](v, f"{where}.{k}") for k, v in table.items()})


def _suggest(seen: str, known: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(seen, known, 1, 0.0)[0]
    return f"the nearest is {near!r}, known are {', '.join(known)}"


def _typed(value: Any, kind: type, where: str) -> Any:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        names = {dict: "a table", list: "a list", str: "a string", int: "a whole number",
                 bool: "true or false"}  # fmt: skip
        raise DescriptionError(f"{where}={value!r}: expected {names[kind]}")
    return value


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DescriptionError(f"{where}={value!r}: expected a number")
    return value


def _list_of(kind: type) -> Callable[[Any, str], tuple[Any, ...]]:
    def read(value: Any, where: str) -> tuple[Any, ...]:
        items = enumerate(_typed(value, list, where))
        return tuple(_typed(item, kind, f"{where}[{i}]") for i, item in items)

    return read


def _is_read(value: Any, where: str) -> Any:
    return value


_READ: dict[str, Callable[[Any, str], Any]] = {
    "str": lambda value, where: _typed(value, str, where),
    "int": lambda value, where: _typed(value, int, where),
    "float": _number,
    "float | None": _number,
    "tuple[int, ...]": _list_of(int),
    "tuple[bool, ...]": _list_of(bool),
    "tuple[str, ...]": _list_of(str),
    "Chip": _is_read,
    "tuple[Fabric, ...]": _is_read,
}
"""How a field is read, by its annotation."""
