"""The backward pass on a TPU: one kernel for dq, by blocks of queries, one for dk and dv, by keys.

Both recompute the probabilities from lse, so that neither adds to what the other writes.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.flash_attention.gradient import finite, sinks_gradient, softmax_delta
from kernels_pallas.flash_attention.reference import (
    FIRST,
    LAST,
    MASKED,
    first_seen,
    key_major,
    query_major,
)
from kernels_pallas.flash_attention.tpu_blocks import (
    Blocks,
    Shape,
    TpuTile,
    columns,
    is_transposed,
    logits,
    part_of,
    parts_ahead,
    rows,
    width_axis,
)
from kernels_pallas.softmax import LOG2E
from kernels_pallas.tpu import dot


def backward(
    q: Array, k: Array, v: Array, segments: Array, o: Array, lse: Array, do: Array, dlse: Array, *,
    scale: float, window: Array | int = 0, sinks: Array | None = None, soft_cap: float = 0.0,
    tile: TpuTile | None = None, interpret: Any = False,
) -> tuple[Array, Array, Array, Array | None]:  # fmt: skip
    """`reference.gradient` as two TPU kernels.

    Raises:
        UnsupportedError: see `Shape.of` and `Blocks.run`.
    """
    shape = Shape.of(q, k, v, tile or TpuTile())
    B, K, T, G, bq, bk = shape.B, shape.K, shape.T, shape.G, shape.bq, shape.bk
    first = first_seen(segments, window)
    delta = softmax_delta(o, lse, do, dlse)
    operands = [
        ("queries", q),
        ("keys", k),
        ("keys", v),
        ("queries", do.astype(q.dtype)),
        ("rows", (finite(lse) * LOG2E).reshape(B, K, G, T)),
        ("rows", delta.reshape(B, K, G, T)),
        ("first", first[:, None]),
    ]
    options = {"scale": scale, "soft_cap": soft_cap}
    blocks = Blocks(shape, keys_inside=True)
    (dq,) = blocks.run(
        partial(_queries_kernel, blocks=blocks, **options),
        query_major(first, bq, bk),
        operands,
        [("queries", q)],
        [pltpu.VMEM((G, shape.H, bq), jnp.float32)],
        name="flash_attention_dq",
        interpret=interpret,
    )
    blocks = Blocks(shape, keys_inside=False)
    dk, dv = blocks.run(
        partial(_keys_kernel, blocks=blocks, **options),
        key_major(first, bq, bk),
        operands,
        [("keys", k), ("keys", v)],
        [pltpu.VMEM((bk, shape.H), jnp.float32), pltpu.VMEM((bk, shape.Hv), jnp.float32)],
        name="flash_attention_dkv",
        interpret=interpret,
    )
    return dq, dk, dv, sinks_gradient(sinks, lse, delta)


class _Scores(NamedTuple):
    """Probabilities of a block of keys and parts of the queries, and the gradient of the scores.

    Attributes:
        k, v: [bk, H] and [bk, Hv].
        seen: of `Blocks.seen`; None where nothing is masked.
        q, do, lse, delta: refs of blocks.
    """

    shape: Shape
    k: Array
    v: Array
    seen: Array | None
    q: Any
    do: Any
    lse: Any
    delta: Any
    scale: float
    soft_cap: float

    def products(self, g: int, at: slice) -> tuple[Array, Array]:
        """Scores k @ q.T before the scale, and dp = v @ do.T, of a head [bk, part of bq]."""
        H, Hv = self.shape.H, self.shape.Hv
        s = dot(self.k, part_of(self.q, H, g, at), (1, width_axis(H)))
        return s, dot(self.v, part_of(self.do, Hv, g, at), (1, width_axis(Hv)))

    def by_part(self, ahead: int) -> Iterator[tuple[int, slice, Array, Array]]:
        """p and ds [bk, part of bq] of each head and part of the queries; ds is not scaled yet."""
        for g, at, (s, dp) in parts_ahead(self.shape, self.products, ahead):
            row = (0, 0, slice(g, g + 1), at)
            s = logits(s, self.scale, self.soft_cap)
            p = jnp.exp2(s - self.lse[row])
            p = p if self.seen is None else jnp.where(self.seen[:, at], p, 0.0)
            ds = p * (dp - self.delta[row])
            if self.soft_cap:
                tanh = s * (1 / (self.soft_cap * LOG2E))
                ds = ds * (1.0 - tanh * tanh)  # the derivative of tanh
            yield g, at, p, ds


def _queries_kernel(
    outer_ref, inner_ref, flags_ref, q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, first_ref,
    dq_ref, sum_ref, *, blocks: Blocks, scale: float, soft_cap: float,
):  # fmt: skip
    """Adds one pair of blocks to dq."""
    shape, step = blocks.shape, pl.program_id(1)
    flags = flags_ref[step]

    @pl.when(flags & FIRST != 0)
    def _start():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    def add(masked: bool) -> None:
        seen = blocks.seen(outer_ref[step], inner_ref[step], first_ref[0]) if masked else None
        k, v = rows(k_ref[0, 0], shape.H), rows(v_ref[0, 0], shape.Hv)
        k_columns = columns(k_ref[0, 0], shape.H)
        scores = _Scores(
            shape, k, v, seen, q_ref, do_ref, lse_ref, delta_ref, scale, soft_cap
        )  # fmt: skip
        for g, at, _, ds in scores.by_part(ahead=1):
            sum_ref[g, :, at] += dot(k_columns, ds.astype(k.dtype), (1, 0))

    pl.when(flags & MASKED != 0)(partial(add, True))
    pl.when(flags & MASKED == 0)(partial(add, False))

    @pl.when(flags & LAST != 0)
    def _finish():
        for g in range(shape.G):
            dq = sum_ref[g] * scale
            dq_ref[0, g] = (dq if is_transposed(shape.H) else dq.T).astype(dq_ref.dtype)


def _keys_kernel(
    outer_ref, inner_ref, flags_ref, q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, first_ref,
    dk_ref, dv_ref, k_sum_ref, v_sum_ref, *, blocks: Blocks, scale: float, soft_cap: float,
):  # fmt: skip
    """Adds one pair of blocks to dk and dv."""
    shape, step = blocks.shape, pl.program_id(1)
    flags = flags_ref[step]

    @pl.when(flags & FIRST != 0)
    def _start():
        k_sum_ref[...] = jnp.zeros_like(k_sum_ref)
        v_sum_ref[...] = jnp.zeros_like(v_sum_ref)

    def add(masked: bool) -> None:
        seen = blocks.seen(outer_ref[step], inner_ref[step], first_ref[0]) if masked else None
        k, v = rows(k_ref[0, 0], shape.H), rows(v_ref[0, 0], shape.Hv)
        scores = _Scores(
            shape, k, v, seen, q_ref, do_ref, lse_ref, delta_ref, scale, soft_cap
        )  # fmt: skip
        for g, at, p, ds in scores.by_part(ahead=0):  # five products keep the matrix unit busy
            q, do = part_of(q_ref, shape.H, g, at), part_of(do_ref, shape.Hv, g, at)
            v_sum_ref[...] += dot(p.astype(do.dtype), do, (1, 1 - width_axis(shape.Hv)))
            k_sum_ref[...] += dot(ds.astype(q.dtype), q, (1, 1 - width_axis(shape.H)))

    pl.when(flags & MASKED != 0)(partial(add, True))
    pl.when(flags & MASKED == 0)(partial(add, False))

    @pl.when(flags & LAST != 0)
    def _finish():
        dk, dv = k_sum_ref[...] * scale, v_sum_ref[...]
        dk_ref[0, 0] = (dk.T if is_transposed(shape.H) else dk).astype(dk_ref.dtype)
        dv_ref[0, 0] = (dv.T if is_transposed(shape.Hv) else dv).astype(dv_ref.dtype)
