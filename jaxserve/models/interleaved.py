"""Layers over two halves of a step's tokens in turn, so that one computes while the other travels.

A layer of experts is attention and experts, and between them, twice, rows on the network. With two
halves of the tokens there is something to compute under each of the four journeys
(CloudMatrix-Infer, 2025, §4.2.3; specification, section 5)::

    first half    rows go out | experts      | answers come | attention of the next layer
    second half   attention   | rows go out  | experts      | answers come

Every row is computed by the same operations as without, so it has the same bits.

A compiler that is free to compute under a journey need not do so. The one for TPUs goes through a
program from its end and puts the end of a collective down before anything else that may come last,
so `_meanwhile` makes the rest of the program wait for both: what has come, just as it has come, and
the work. The beginning then finds its place before what can be done without it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxserve.models.layers import Underway, layer_of, run_layers
from jaxserve.models.ops import Halves, Ops


class Parts(NamedTuple):
    """A layer, cut where rows travel.

    Attributes:
        attend: (ops, rope, p, x, kv, i) -> x, kv.
        send: (ops, p, x, kv, i) -> an `Underway`, kv: rows go to their experts.
        answer: (ops, p, underway) -> underway: the experts of this device.
        reply: (ops, underway) -> underway: answers come back.
        receive: (ops, underway) -> x: and are added up.
    """

    attend: Callable[..., tuple[Array, Any]]
    send: Callable[..., tuple[Underway, Any]]
    answer: Callable[..., Underway]
    reply: Callable[..., Underway]
    receive: Callable[..., Array]

    def of(self, ops: Ops, rope: Any) -> Parts:
        """The same with some tokens' operations."""
        return Parts(
            partial(self.attend, ops, rope), partial(self.send, ops), partial(self.answer, ops),
            partial(self.reply, ops), partial(self.receive, ops),
        )  # fmt: skip


def run_parts(
    ops: Ops, parts: Parts, rope: Any, stacks: Sequence[Any], x: Array, kv: Any
) -> tuple[Array, Any]:
    """Every layer over x [B, T, D]; in turn for halves, if `ops` has them."""
    if ops.halves is not None:
        return _in_turn(ops.halves, parts, rope, stacks, x, kv)
    whole = parts.of(ops, rope)

    def layer(p: Any, x: Array, kv: Any, i: Array | int) -> tuple[Array, Any]:
        x, kv = whole.attend(p, x, kv, i)
        sent, kv = whole.send(p, x, kv, i)
        return whole.receive(whole.reply(whole.answer(p, sent))), kv

    x, kv = run_layers(ops, layer, stacks, ops.own_tokens(x), kv)
    return ops.all_tokens(x), kv


def _in_turn(
    halves: Halves, parts: Parts, rope: Any, stacks: Sequence[Any], x: Array, kv: Any
) -> tuple[Array, Any]:
    ropes = zip(*map(halves.cut, jax.tree.leaves(rope)), strict=True)
    ropes = [jax.tree.unflatten(jax.tree.structure(rope), leaves) for leaves in ropes]
    one, two = (parts.of(o, r) for o, r in zip(halves.ops, ropes, strict=True))
    a, b = (o.own_tokens(part) for o, part in zip(halves.ops, halves.cut(x), strict=True))

    def to_experts(p: Any, a: Array, b: Array, kv: Any, i: Any) -> tuple[Array, Underway, Any]:
        """From the first half's attention of a layer to the second half's answers, still there."""
        sent_a, kv = one.send(p, a, kv, i)
        b, kv = two.attend(p, b, kv, i)
        b, sent_a = _meanwhile(b, sent_a)
        sent_b, kv = two.send(p, b, kv, i)
        answered_a, sent_b = _meanwhile(one.answer(p, sent_a), sent_b)
        answered_b, replied_a = _meanwhile(two.answer(p, sent_b), one.reply(answered_a))
        return one.receive(replied_a), answered_b, kv

    def to_attention(
        p: Any, a: Array, answered_b: Underway, kv: Any, i: Any
    ) -> tuple[Array, Array, Any]:
        """The second half's answers, and the first half's attention of the next layer."""
        a, kv = one.attend(p, a, kv, i)
        a, replied_b = _meanwhile(a, two.reply(answered_b))
        return a, two.receive(replied_b), kv

    a, kv = one.attend(layer_of(stacks[0], 0), a, kv, 0)
    first = 0
    for stack, following in zip(stacks, [*stacks[1:], None], strict=True):
        n = jax.tree.leaves(stack)[0].shape[0]

        def body(carry: tuple[Array, Array, Any], i: Array) -> tuple[Any, None]:
            a, b, kv = carry
            p, at = layer_of(stack, i), first + i  # noqa: B023
            a, answered_b, kv = to_experts(p, a, b, kv, at)
            return to_attention(layer_of(stack, i + 1), a, answered_b, kv, at + 1), None  # noqa: B023

        if n > 1:
            (a, b, kv), _ = lax.scan(body, (a, b, kv), jnp.arange(n - 1, dtype=jnp.int32))
        first += n
        a, answered_b, kv = to_experts(layer_of(stack, n - 1), a, b, kv, first - 1)
        if following is None:
            b = two.receive(two.reply(answered_b))
        else:
            a, b, kv = to_attention(layer_of(following, 0), a, answered_b, kv, first)
    return halves.join(*(o.all_tokens(x) for o, x in zip(halves.ops, (a, b), strict=True))), kv


def _meanwhile(work: Any, travelled: Underway) -> tuple[Any, Underway]:
    """Both, neither to be used before the other is there: `work` is done while the other comes."""
    if travelled.visit is None:
        return work, travelled
    return lax.optimization_barrier((work, travelled))
