"""How a step computes: the operations that a model is written in.

A model says *what* is computed. `Ops` says *how*: with the plain references (training, parity,
absent hardware), with kernels over a paged cache (serving), or on a mesh. It is an argument, so
that nothing is looked up in a global and the same model lowers for a platform that is not there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import jax.numpy as jnp
from jax import Array, lax

import kernels_pallas.linear
import kernels_pallas.rms_norm
import kernels_pallas.rope
import moe.experts
from moe.router import Router


class Attend(Protocol):
    """Attention over this step's keys and whatever the cache holds."""

    def __call__(
        self,
        q: Array,  # [B, T, N, H]
        k: Array,  # [B, T, K, H]
        v: Array | None,  # [B, T, K, Hv]; None: the first `value_dim` lanes of k (latent attention)
        kv: Any,
        layer: Array | int,
        *,
        scale: float,
        window: Array | int = 0,  # keys at least this far back are hidden; 0 hides none
        sinks: Any = None,  # [N], a logit per head that joins the softmax and carries no value
        soft_cap: float = 0.0,
        value_dim: int | None = None,
    ) -> tuple[Array, Any]:  # [B, T, N, Hv] and the cache, with k and v in it
        ...


class AttendMade(Protocol):
    """Attention among this step's tokens, over keys made of what the cache keeps of them.

    It is for steps that begin their sequences: the cache is written and not read.
    """

    def __call__(
        self,
        q: Array,  # [B, T, N, H]
        row: Array,  # [B, T, 1, W], which the cache keeps
        make: Callable[[Array], tuple[Array, Array]],  # rows [B, S, W] -> k, v [B, S, N, H or Hv]
        kv: Any,
        layer: Array | int,
        *,
        scale: float,
    ) -> tuple[Array, Any]:  # [B, T, N, Hv] and the cache, with the rows in it
        ...


def embed(table: Array, tokens: Array, *, dtype: Any) -> Array:
    """Rows of table [V, D] for tokens [B, T], in the type that activations have.

    On CPU, 16-bit tables are gathered as integers: XLA of jax 0.10 widens a whole bfloat16 table
    before it takes a row of it. On a TPU the table of integers would be a copy.
    """

    def rows(table: Array, tokens: Array) -> Array:
        return table[tokens]

    def rows_as_bits(table: Array, tokens: Array) -> Array:
        bits = lax.bitcast_convert_type(table, jnp.uint16)
        return lax.bitcast_convert_type(bits[tokens], table.dtype)

    if table.dtype.itemsize != 2:
        return rows(table, tokens).astype(dtype)
    found = lax.platform_dependent(table, tokens, cpu=rows_as_bits, default=rows)
    return found.astype(dtype)


def unrecorded(kv: Any, layer: Array | int, router: Router, scores: Array, ids: Array) -> Any:
    """Takes no notice of the routing of a layer's tokens: scores [T, E], ids [T, A]."""
    return kv


def undisturbed(kv: Any, layer: Array | int, scores: Array) -> Array | None:
    """No noise for a layer's tokens, whose router says scores [T, E]."""
    return None


@dataclass(frozen=True)
class Halves:
    """Two halves of a step's tokens that take turns (jaxserve/models/interleaved.py).

    Attributes:
        ops: operations of each.
        cut: [B, T, ...] -> both halves [B, T / 2, ...].
        join: the way back.
    """

    ops: tuple[Ops, Ops]
    cut: Callable[[Array], tuple[Array, Array]]
    join: Callable[[Array, Array], Array]


@dataclass(frozen=True)
class Spread:
    """A step's tokens over devices that share its attention: each has some tokens in every layer,
    and for attention some heads (CloudMatrix-Infer, 2025, §4.3.1; specification, section 7).

    Attributes:
        ops: operations on a device's own tokens.
        own: of all tokens [B, T, ...], this device's [B, T / n, ...].
        gather: the way back.
        to_tokens: what a device's heads say to all tokens [B, T, N / n, H] becomes what all heads
            say to its own [B, T / n, N, H].
    """

    ops: Ops
    own: Callable[[Array], Array]
    gather: Callable[[Array], Array]
    to_tokens: Callable[[Array], Array]


@dataclass(frozen=True)
class Ops:
    """Implementations of every operation; the fields' signatures are those of the references.

    Attributes:
        attend: see `Attend`.
        attend_made: see `AttendMade`; None: the step has earlier keys to read.
        dtype: element type of activations.
        experts_on_rows: what `experts` is made of where rows come from other devices.
        lookup: see `embed` above.
        record: looks at every layer's routing, and returns `kv` with what it wants to keep.
        disturb: noise [T, E] on a router's scores, for the choice of experts; None: there is none.
        layers: how a stack is run. "indexed": weights stay in their stack, so that none is copied
            (serving). "sliced": a scan takes its slices, so that gradients are stacked rather than
            summed over whole stacks (training). "recomputed": that, and a layer's activations are
            computed again in the backward pass, which costs a third more time for much less memory.
        halves: layers are run over two halves of the tokens in turn.
        spread: outside of attention, layers are run over tokens of each device's own.
    """

    attend: Attend
    dtype: Any
    attend_made: AttendMade | None = None
    linear: Callable[..., Any] = kernels_pallas.linear.linear
    gated_linear: Callable[..., Array] = kernels_pallas.linear.gated_linear
    rms_norm: Callable[..., Array] = kernels_pallas.rms_norm.rms_norm
    rotate: Callable[..., Array] = kernels_pallas.rope.rotate
    experts: Callable[..., Array] = moe.experts.experts
    experts_on_rows: Callable[..., Array] = moe.experts.experts_on_rows
    lookup: Callable[..., Array] = embed
    record: Callable[..., Any] = unrecorded
    disturb: Callable[..., Array | None] = undisturbed
    layers: Literal["indexed", "sliced", "recomputed"] = "indexed"
    halves: Halves | None = None
    spread: Spread | None = None

    @property
    def by_token(self) -> Ops:
        """Operations on what a layer does to each token by itself."""
        return self if self.spread is None else self.spread.ops

    def own_tokens(self, x: Array) -> Array:
        """This device's part of x [B, T, ...], as layers take it."""
        return x if self.spread is None else self.spread.own(x)

    def all_tokens(self, x: Array) -> Array:
        """The way back from `own_tokens`."""
        return x if self.spread is None else self.spread.gather(x)

    def embed(self, table: Array, tokens: Array) -> Array:
        return self.lookup(table, tokens, dtype=self.dtype)
