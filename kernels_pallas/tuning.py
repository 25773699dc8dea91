"""Tile sizes that were measured or compiled best, one JSON file for each device under tuned/.

    {"int8_matmul": {"int8[64,4096] ...": {"implementation": "mosaic_gpu", "tile": {"block_m": 64},
                                           "source": "measured", "ms": {...}, ...}}}

A signature is that of `Op.signature`. The implementation is a body, or "reference" where XLA's own
is faster; without a tile a body chooses for itself. The rest says where an entry is from:
"measured" on the device, or "compiled" where tiles that spill or do not fit were ruled out and
nothing was timed. Whatever is not in the table runs with a body's defaults.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TUNED = Path(__file__).parent / "tuned"

Table = dict[str, dict[str, dict[str, Any]]]
"""op -> signature -> entry."""


@functools.cache
def table(device: str) -> Table:
    """What is known about a device."""
    path = TUNED / f"{device}.json"
    return json.loads(path.read_text()) if device and path.exists() else {}


def tuned(device: str, op: str, signature: str) -> tuple[str | None, dict[str, int]]:
    """The implementation that won there and its tile sizes; None if nobody has measured."""
    entry = table(device).get(op, {}).get(signature, {})
    return entry.get("implementation"), entry.get("tile", {})


def entry(implementation: str, tile: Any, *, source: str, **provenance: Any) -> dict[str, Any]:
    """What a table says of one signature.

    Args:
        tile: a body's tile; None where it chooses for itself.
        source: "measured" or "compiled".
    """
    sizes = {} if tile is None else {"tile": dataclasses.asdict(tile)}
    return {"implementation": implementation, **sizes, "source": source, **provenance}


def merge(path: Path, found: Mapping[str, Mapping[str, dict[str, Any]]]) -> None:
    """Puts entries into a file beside those it has. What was compiled never replaces what was
    measured."""
    known: Table = json.loads(path.read_text()) if path.exists() else {}
    for op, entries in found.items():
        mine = known.setdefault(op, {})
        for signature, new in entries.items():
            old = mine.get(signature, {})
            if new["source"] == "measured" or old.get("source") != "measured":
                mine[signature] = new
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
    table.cache_clear()
