"""Scales of an eight-bit cache: how large each lane of keys and values becomes on real text.

A key is kept as RoPE has turned it, and turns further at later positions than the text has: what
stood in one lane of a pair then stands in the other. So a pair has the scale of its length, which
turning leaves alone.
"""

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
        documents: token ids; they may be shorter than the sequences that will be served.
        advance: told how many tokens have been read.
    """
    params, tops = jax.tree.map(jnp.asarray, leaves.tree()), dict[tuple[str, int], Array]()
    cfg = leaves.cfg
    first, pairs = sum(cfg.key_parts[:-1]), len(cfg.rope.inv_freq)  # the last part is turned
    for tokens, segments in batches(documents, cfg.max_len):
        at = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        real = jnp.asarray(segments > 0)
        attend = _watched(packed(jnp.asarray(segments), at), real, tops, (first, pairs))
        ops = Ops(attend=attend, dtype=jnp.float32)
        leaves.family.forward(cfg, params, jnp.asarray(tokens), at, ops, None)
        advance(int((segments > 0).sum()))
    layers = range(cfg.num_layers)
    kinds = [kind for kind in "kv" if (kind, 0) in tops]
    rows = {kind: jnp.stack([tops[kind, i] for i in layers])[:, None] for kind in kinds}
    return {kind: np.asarray(calibrate(x, MARGIN)) for kind, x in rows.items()}


def _watched(
    attend: Attend, real: Array, tops: dict[tuple[str, int], Array], turned: tuple[int, int]
) -> Attend:
    """`attend`, with the largest magnitude [K, H] of each layer's keys and values put in `tops`.

    Args:
        real: [B, T], which tokens are no padding.
        turned: the first lane of a key that RoPE turns, and the number of pairs.
    """

    def see(kind: str, layer: int, x: Array) -> None:
        top = jnp.where(real[..., None, None], x, 0.0).max((0, 1))
        seen = tops.get((kind, layer))
        tops[kind, layer] = top if seen is None else jnp.maximum(seen, top)

    def watch(q: Array, k: Array, v: Array | None, kv: Any, layer: Any, **options: Any) -> Any:
        see("k", int(layer), reach(k, *turned))
        if v is not None:
            see("v", int(layer), jnp.abs(v))
        return attend(q, k, v, kv, layer, **options)

    return watch


def reach(k: Array, first: int, pairs: int) -> Array:
    """The largest magnitude of each lane of keys [..., H], whatever their position.

    Args:
        first: the first lane that RoPE turns.
        pairs: lane `first + i` is turned with `first + pairs + i`; also where a checkpoint has
            pairs as neighbours (`kernels_pallas.rope.rotate` leaves halves). Other lanes stay.
    """
    head, a, b, tail = jnp.split(jnp.abs(k), [first, first + pairs, first + 2 * pairs], -1)
    length = jnp.hypot(a, b)
    return jnp.concatenate([head, length, length, tail], -1)
