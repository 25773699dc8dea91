"""Tile sizes that were measured or compiled best, one JSON file for each device under tuned/.

    {"int8_matmul": {"int8[64,4096] ...": {"implementation": "mosaic_gpu", "tile": {"m": 64}}}}

A signature is that of `op.signature`. Whatever is not in the table runs with a body's defaults.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

TUNED = Path(__file__).parent / "tuned"


@functools.cache
def table(device: str) -> dict[str, dict[str, dict[str, Any]]]:
    """What is known about a device: op -> signature -> entry."""
    path = TUNED / f"{device}.json"
    return json.loads(path.read_text()) if device and path.exists() else {}


def tuned(device: str, op: str, signature: str) -> tuple[str | None, dict[str, int]]:
    """The implementation that won there and its tile sizes; None if nobody has measured."""
    entry = table(device).get(op, {}).get(signature, {})
    return entry.get("implementation"), entry.get("tile", {})
