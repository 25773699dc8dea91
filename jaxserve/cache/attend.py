"""Attention over the paged cache, as a model asks for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from jax import Array

from jaxserve.cache.kv_cache import KVCache
from jaxserve.models.ops import Attend
from kernels_pallas.paged_attention import Ragged, paged_attention


def paged(batch: Ragged, kernel: Callable[..., Any] = paged_attention) -> Attend:
    """Attends the step's tokens [1, T] to the pages that `batch` gives their sequences."""

    def attend(
        q: Array, k: Array, v: Array | None, kv: KVCache, layer: Array | int, **options: Any
    ):
        first = None if v is None else v[0]
        o, _, k_pages, v_pages = kernel(q[0], k[0], first, kv.k, kv.v, layer, batch, **options)
        return o.astype(q.dtype)[None], replace(kv, k=k_pages, v=v_pages)

    return attend
