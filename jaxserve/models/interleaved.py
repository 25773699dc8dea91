"""Layers over two halves of a step's tokens in turn, so that one computes while the other travels.

A layer of experts is attention, which computes, and experts elsewhere, which mostly wait for the
network. With the second half of the tokens half a layer behind the first, attention of one has no
need of the experts' answers for the other, and a compiler that starts collectives early has work to
put under each of them (CloudMatrix-Infer, 2025, §4.2.3; specification, section 5)::

    first half    attend 0   experts 0   attend 1   experts 1
    second half              attend 0    experts 0  attend 1   experts 1

Every row is computed by the same operations as without, so it has the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxserve.models.layers import layer_of, run_layers
from jaxserve.models.ops import Halves, Ops

Half = Callable[..., tuple[Array, Any]]
"""(ops, rope, p, x, kv, i) -> x, kv: attention's part of a layer, or its MLP's."""


def run_halves(
    ops: Ops, attend: Half, mix: Half, rope: Any, stacks: Sequence[Any], x: Array, kv: Any
) -> tuple[Array, Any]:
    """Every layer's attention and MLP over x [B, T, D]; in turn for halves, if `ops` has them."""
    if ops.halves is not None:
        return _in_turn(ops.halves, attend, mix, rope, stacks, x, kv)

    def layer(p: Any, x: Array, kv: Any, i: Array | int) -> tuple[Array, Any]:
        x, kv = attend(ops, rope, p, x, kv, i)
        return mix(ops, rope, p, x, kv, i)

    x, kv = run_layers(ops, layer, stacks, ops.own_tokens(x), kv)
    return ops.all_tokens(x), kv


def _in_turn(
    halves: Halves, attend: Half, mix: Half, rope: Any, stacks: Sequence[Any], x: Array, kv: Any
) -> tuple[Array, Any]:
    ropes = zip(*map(halves.cut, jax.tree.leaves(rope)), strict=True)
    ropes = [jax.tree.unflatten(jax.tree.structure(rope), leaves) for leaves in ropes]
    attend_a, attend_b = (partial(attend, o, r) for o, r in zip(halves.ops, ropes, strict=True))
    mix_a, mix_b = (partial(mix, o, r) for o, r in zip(halves.ops, ropes, strict=True))
    first, parts = 0, zip(halves.ops, halves.cut(x), strict=True)
    a, b = (ops.own_tokens(part) for ops, part in parts)
    for stack in stacks:
        n = jax.tree.leaves(stack)[0].shape[0]

        def begin(i: Array | int, a: Array, b: Array, kv: Any, p: Any) -> tuple[Array, Array, Any]:
            """Layer i of the first half, and the second half's attention."""
            a, kv = attend_a(p, a, kv, i)
            after, kv = mix_a(p, a, kv, i)
            b, kv = attend_b(p, b, kv, i)
            return after, b, kv

        def body(carry: tuple[Array, Array, Any], i: Array) -> tuple[Any, None]:
            a, b, kv = carry
            b, kv = mix_b(layer_of(stack, i - 1), b, kv, first + i - 1)  # noqa: B023
            return begin(first + i, a, b, kv, layer_of(stack, i)), None  # noqa: B023

        a, b, kv = begin(first, a, b, kv, layer_of(stack, 0))
        if n > 1:
            (a, b, kv), _ = lax.scan(body, (a, b, kv), jnp.arange(1, n, dtype=jnp.int32))
        b, kv = mix_b(layer_of(stack, n - 1), b, kv, first + n - 1)
        first += n
    return halves.join(*(o.all_tokens(x) for o, x in zip(halves.ops, (a, b), strict=True))), kv
