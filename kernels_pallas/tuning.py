"""Tile sizes that were found best, in one JSON file per device under tuned/.

    {"int8_matmul": {"int8[64,4096] ...": {"implementation": "mosaic_gpu", "tile": {"block_m": 64},
                                           "source": "measured", "ms": {...}, ...}}}

A signature is that of `Op.signature`. The implementation is a body, or "reference" where XLA alone
is faster; without a tile, a body uses its own choice. The rest of an entry says where it is from:
"measured" on the device, or "compiled" if tiles that spill or do not fit were ruled out and nothing
was timed. What is not in the table runs with a body's own choice.
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
    """The entries of a device; empty if there is no file for it."""
    path = TUNED / f"{device}.json"
    return json.loads(path.read_text()) if device and path.exists() else {}


def tuned(device: str, op: str, signature: str) -> tuple[str | None, dict[str, int]]:
    """The implementation that was best and its tile sizes; None and no sizes if none is known."""
    entry = table(device).get(op, {}).get(signature, {})
    return entry.get("implementation"), entry.get("tile", {})


def entry(implementation: str, tile: Any, *, source: str, **provenance: Any) -> dict[str, Any]:
    """One entry of a table.

    Args:
        tile: a body's tile; None for the body's own choice.
        source: "measured" or "compiled".
        provenance: what else is known, such as times; it must go into JSON.
    """
    sizes = {} if tile is None else {"tile": dataclasses.asdict(tile)}
    return {"implementation": implementation, **sizes, "source": source, **provenance}


def merge(path: Path, found: Mapping[str, Mapping[str, dict[str, Any]]]) -> None:
    """Adds entries to a file; a compiled one never replaces a measured one.

    Args:
        path: of the file, which is made if it is missing.
        found: op -> signature -> entry.
    """
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
