"""Cross-entropy of packed documents through a served model's own forward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxserve.models.attention import packed
from jaxserve.models.family import Family
from jaxserve.models.ops import Ops
from jaxserve.train.data import Batch
from moe.experts import dense_experts, experts
from moe.losses import empty_tally, record

_CHUNK = 4096  # tokens whose logits exist at a time
_DENSE = 8  # experts up to which every token visits all of them


class Metrics(NamedTuple):
    """Scalars of one step."""

    loss: Any  # mean cross-entropy of the targets, nats
    accuracy: Any  # share of targets that are the most likely token
    balance: Any  # mean balance loss of a routed layer; 1 is even, 0 where nothing is routed
    ahead: Any = 0.0  # mean cross-entropy of the tokens after those, where a layer predicts them
    grad_norm: Any = 0.0


def training_ops(
    batch: Batch,
    dtype: Any,
    *,
    num_experts: int = 0,
    layers: Literal["sliced", "recomputed"] = "sliced",
) -> Ops:
    """Operations over packed documents: no cache, gradients everywhere, routing on record."""
    return Ops(
        attend=packed(batch.segments, batch.positions),
        dtype=dtype,
        experts=dense_experts if num_experts <= _DENSE else experts,
        record=record((jnp.asarray(batch.segments) > 0).reshape(-1).astype(jnp.float32)),
        layers=layers,
    )


def num_experts(cfg: Any) -> int:
    router = getattr(cfg, "router", None)
    return router.num_experts if router else 0


def cross_entropy(
    head: Callable[[Array], Array], hidden: Array, targets: Array, weights: Array
) -> tuple[Array, Array]:
    """Weighted mean cross-entropy of targets [...], and the share that is the most likely token.

    Logits are made and thrown away a chunk at a time, so that a large vocabulary fits.

    Args:
        head: hidden states [n, D] to logits [n, V].
        hidden: [..., D].
    """
    flat = hidden.reshape(-1, hidden.shape[-1])
    n = flat.shape[0]
    size = min(_CHUNK, n)
    pad = -n % size
    rows = (flat, targets.reshape(-1), weights.reshape(-1))
    chunks = tuple(
        jnp.pad(x, ((0, pad),) + ((0, 0),) * (x.ndim - 1)).reshape(-1, size, *x.shape[1:])
        for x in rows
    )

    @jax.checkpoint
    def chunk(inputs: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        x, target, weight = inputs
        scores = head(x).astype(jnp.float32)
        chosen = jnp.take_along_axis(scores, target[:, None], -1)[:, 0]
        right = jnp.argmax(scores, -1) == target
        return jnp.sum(weight * (jax.nn.logsumexp(scores, -1) - chosen)), jnp.sum(
            jnp.where(right, weight, 0.0)
        )

    total, right = (
        lax.map(chunk, chunks)
        if len(chunks[0]) > 1
        else chunk(jax.tree.map(lambda x: x[0], chunks))
    )
    count = jnp.maximum(weights.sum(), 1.0)
    return jnp.sum(total) / count, jnp.sum(right) / count


def next_token_loss(
    family: Family,
    cfg: Any,
    params: Any,
    batch: Batch,
    ops: Ops,
    *,
    balance: float = 0.01,
    ahead: float = 0.0,
) -> tuple[Array, Metrics]:
    """What is minimised: cross-entropy, and what shapes the model beside it.

    Args:
        balance: weight of the routed layers' mean balance loss.
        ahead: weight of the cross-entropy of tokens two ahead; the family has `predict` for them.
    """

    def head(x: Array) -> Array:
        return family.logits(cfg, params, x[None], ops)[0]

    tally = empty_tally(cfg.num_layers + bool(ahead), num_experts(cfg))
    hidden, tally = family.forward(cfg, params, batch.tokens, batch.positions, ops, tally)
    loss, accuracy = cross_entropy(head, hidden, batch.targets, batch.weights)
    second = jnp.float32(0)
    if ahead:
        predict = family.predict  # type: ignore[attr-defined]
        further, tally = predict(cfg, params, hidden, batch.targets, batch.positions, ops, tally)
        second, _ = cross_entropy(head, further, *second_targets(batch))
    num_routed = sum(getattr(cfg, "moe_layers", ())) + bool(ahead)
    uneven = tally.balance / max(num_routed, 1)
    metrics = Metrics(loss, accuracy, uneven, second)
    return loss + balance * uneven + ahead * second, metrics


def second_targets(batch: Batch) -> tuple[Array, Array]:
    """The token two ahead of each, and its weight: 0 where the document ends before it."""
    targets, weights = (
        jnp.pad(jnp.asarray(x)[:, 1:], ((0, 0), (0, 1))) for x in (batch.targets, batch.weights)
    )
    segments = jnp.asarray(batch.segments)
    inside = jnp.pad(segments[:, 1:] == segments[:, :-1], ((0, 0), (0, 1)))
    return targets, jnp.where(inside, weights, 0.0)
