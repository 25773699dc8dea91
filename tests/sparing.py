"""Tables of cases of which a quick run takes a few."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def sparing(values: Iterable[Any], *quick: Any) -> list[Any]:
    """The values, all but the `quick` ones marked slow."""

    def case(value: Any) -> Any:
        row = value if isinstance(value, tuple) else (value,)
        return value if value in quick else pytest.param(*row, marks=pytest.mark.slow)

    return [case(value) for value in values]
