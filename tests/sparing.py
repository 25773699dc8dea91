"""Tables of cases of which a quick run takes a few."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def sparing(values: Iterable[Any], *quick: Any) -> list[Any]:
    """The values, all but the `quick` ones marked slow."""
    return [v if v in quick else pytest.param(v, marks=pytest.mark.slow) for v in values]
