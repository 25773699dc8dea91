"""Scales of an eight-bit cache: how large each lane of keys and values becomes on real text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxserve.models.attention import packed
from jaxserve.models.ops import Attend, Ops
from jaxserve.quant.leaves import Leaves
from jaxserve.quant.record import batches
from kernels_pallas.paged_attention.codec import calibrate

MARGIN = 1.1
"""How much larger than in calibration a lane may become before it is cut."""


def calibrate_cache(
    leaves: Leaves,
    documents: Sequence[Sequence[int]],
    *,
    advance: Callable[[int], None] = lambda tokens: None,
) -> dict[str, np.ndarray]:
    """Scales "k" [L, K, H] and "v" [L, K, Hv] (none where values are lanes of keys).

    Args:
        leaves: the model as it will be served.
        advance: told how many tokens have been read.
    """
    params, tops = jax.tree.map(jnp.asarray, leaves.tree()), dict[tuple[str, int], Array]()
    for tokens, segments in batches(documents, leaves.cfg.max_len):
        at = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        attend = _watched(packed(jnp.asarray(segments), at), jnp.asarray(segments > 0), tops)
        ops = Ops(attend=attend, dtype=jnp.float32)
        leaves.family.forward(leaves.cfg, params, jnp.asarray(tokens), at, ops, None)
        advance(int((segments > 0).sum()))
    layers = range(leaves.cfg.num_layers)
    kinds = [kind for kind in "kv" if (kind, 0) in tops]
    rows = {kind: jnp.stack([tops[kind, i] for i in layers])[:, None] for kind in kinds}
    return {kind: np.asarray(calibrate(x, MARGIN)) for kind, x in rows.items()}


def _watched(attend: Attend, real: Array, tops: dict[tuple[str, int], Array]) -> Attend:
    """`attend`, with the largest magnitude [K, H] of each layer's keys and values put in `tops`."""

    def see(kind: str, layer: int, x: Array) -> None:
        top = jnp.abs(jnp.where(real[..., None, None], x, 0.0)).max((0, 1))
        seen = tops.get((kind, layer))
        tops[kind, layer] = top if seen is None else jnp.maximum(seen, top)

    def watch(q: Array, k: Array, v: Array | None, kv: Any, layer: Any, **options: Any) -> Any:
        see("k", int(layer), k)
        if v is not None:
            see("v", int(layer), v)
        return attend(q, k, v, kv, layer, **options)

    return watch
