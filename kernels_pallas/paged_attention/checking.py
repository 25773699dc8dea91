"""What arguments of `page_write` and `page_attention` must have in common."""

from __future__ import annotations

from typing import Any

from kernels_pallas import shapes
from kernels_pallas.paged_attention.ragged import Ragged


def check_write(k_pages, v_pages, k, v, layer, batch) -> None:
    """Raises ValueError where the arguments of `page_write` do not go together."""
    given = _pages(k_pages, v_pages) | {"k": (k, "float T K H")}
    if (v is None) != (v_pages is None):
        there, missing = ("v", "v_pages") if v_pages is None else ("v_pages", "v")
        raise ValueError(f"page_write: {missing} is None with {there}: expected both, or neither")
    if v is not None:
        given["v"] = (v, "float T K Hv")
    sizes = shapes.check("page_write", **given, **_batch("page_write", batch))
    _fits("page_write", "k", sizes["H"], "k_pages", sizes["W"])
    if v is not None:
        _fits("page_write", "v", sizes["Hv"], "v_pages", sizes["Wv"])


def check_attention(
    q, k_pages, v_pages, layer, batch, *, sinks: Any = None, value_dim: int | None = None,
    **options: Any,
) -> None:  # fmt: skip
    """Raises ValueError where the arguments of `page_attention` do not go together."""
    given = {"q": (q, "float T N H")} | _pages(k_pages, v_pages)
    if sinks is not None:
        given["sinks"] = (sinks, "float N")
    sizes = shapes.check("page_attention", **given, **_batch("page_attention", batch))
    shapes.check_heads("page_attention", sizes["N"], sizes["K"])
    _fits("page_attention", "q", sizes["H"], "k_pages", sizes["W"])
    name, width = ("k_pages", "W") if v_pages is None else ("v_pages", "Wv")
    _fits("page_attention", "value_dim", value_dim or 0, name, sizes[width])


def _pages(k_pages, v_pages) -> dict[str, Any]:
    found = {"k_pages": (k_pages, "any L P K Z W")}
    return found if v_pages is None else found | {"v_pages": (v_pages, "any L P K Z Wv")}


def _batch(op: str, batch) -> dict[str, Any]:
    if not isinstance(batch, Ragged):
        raise ValueError(f"{op}: batch is of type {type(batch).__name__}: expected Ragged")
    return {
        "kv_lens": (batch.kv_lens, "int32 R"),
        "row_starts": (batch.row_starts, "int32 R+1"),
        "tables": (batch.tables, "int32 R M"),
    }


def _fits(op: str, name: str, lanes: int, pages: str, width: int) -> None:
    if lanes > width:
        raise ValueError(f"{op}: {name} is {lanes} lanes wide: expected at most {width} of {pages}")
