"""How a model computes on a mesh: each device has its share of the weights, and some sums go round.

A step runs inside `jax.shard_map`, so models see the shapes of one device, and fewer heads, a
narrower MLP or a part of the vocabulary are nothing to them. What they cannot see is that a product
with a weight whose *inputs* are split is a part of a sum, or that a table is a part of the
vocabulary. Those weights are marked, and the operations here look at the mark. Layers are divided
as in Megatron-LM (Shoeybi et al., 2019): two sums a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxserve.models.ops import Ops, Spread
from kernels_pallas.weight import as_array
from moe.dispatch import Dispatch
from moe.experts import Experts
from moe.parallel import FarExperts, PlacedExperts
from moe.placement import Placement
from sharding.collectives import all_gather, all_to_all
from sharding.mesh import TENSOR, Parallelism, put
from sharding.rules import PREFILL, fitted, spec
from sharding.tree import Weight, is_weight


@dataclass(frozen=True)
class _Split:
    part: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return self.part.shape

    @property
    def dtype(self) -> Any:
        return self.part.dtype


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class InputSplit(_Split):
    """A weight [*out, in / devices]: its product is a part of a sum over the axis "tensor"."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class VocabSplit(_Split):
    """A table [V / devices, D] of some of the tokens, in their order along the axis "tensor"."""


def placed(tree: Any, placement: Placement, put: Callable[[Any], Any]) -> Any:
    """A tree whose layers of experts know where those live.

    Args:
        placement: of every layer that has experts, in order; leading axes are layers.
        put: what becomes of a stack's part of the tables.
    """
    experts = experts_of(tree)
    tables = by_stack(placement, [len(jax.tree.leaves(stack)[0]) for stack in experts])
    return with_experts(
        tree,
        [PlacedExperts(e, jax.tree.map(put, t)) for e, t in zip(experts, tables, strict=True)],
    )


def experts_of(tree: Any) -> tuple[Any, ...]:
    """The experts of every stack of layers that has any, in order."""
    found = (getattr(stack.mlp, "experts", None) for stack in tree.stacks)
    return tuple(experts for experts in found if experts is not None)


def expert_layers(tree: Any) -> list[int]:
    """Numbers of the layers that have experts."""
    has = [
        getattr(stack.mlp, "experts", None) is not None
        for stack in tree.stacks
        for _ in range(len(jax.tree.leaves(stack)[0]))
    ]
    return [i for i, mixture in enumerate(has) if mixture]


def with_experts(tree: Any, experts: Iterable[Any]) -> Any:
    """The tree with others in their place."""
    following = iter(experts)

    def changed(stack: Any) -> Any:
        if getattr(stack.mlp, "experts", None) is None:
            return stack
        return replace(stack, mlp=replace(stack.mlp, experts=next(following)))

    return replace(tree, stacks=tuple(map(changed, tree.stacks)))


def by_stack(tree: Any, sizes: Sequence[int]) -> list[Any]:
    """A tree of arrays [L, ...] in parts of so many layers each."""
    ends = np.cumsum(sizes)
    return [
        jax.tree.map(lambda a, i=end - n, j=end: a[i:j], tree)
        for n, end in zip(sizes, ends, strict=True)
    ]


def marked(declared: Any, params: Any, sizes: Mapping[str, int], parallelism: Parallelism) -> Any:
    """One device's params, with marks where an operation must know of the other devices.

    Args:
        declared: the tree of `Weight` that params fill.
        sizes: of every axis of the model.
    """
    if declared.lm_head is None and params.lm_head is not None:  # a copy of the table of its own
        declared = replace(declared, lm_head=declared.embed)

    def mark(w: Weight | Experts, leaf: Any) -> Any:
        if isinstance(w, Experts):  # their own operation knows how they are split
            return leaf
        split = place_of(w, sizes, parallelism)
        if w.axes[0] == "vocab" and split[0]:
            return VocabSplit(leaf)
        return InputSplit(leaf) if split[-1] and w.is_matrix else leaf

    return jax.tree.map(
        mark, declared, params, is_leaf=lambda x: is_weight(x) or isinstance(x, Experts)
    )


def parallel_ops(ops: Ops, dispatch: Dispatch | None, num_rows: Array, *, split: bool) -> Ops:
    """The operations of one device of a mesh, from those of a device alone.

    Args:
        dispatch: how tokens reach experts that live elsewhere; None: every device has a part of
            the width of each.
        num_rows: real tokens of the step.
        split: whether there are several devices along the axis "tensor".
    """
    if dispatch is None:
        experts = partial(_narrow_experts, ops.experts)
    else:
        replicated = (TENSOR,) if split else ()
        experts = FarExperts(dispatch, ops.experts_on_rows, replicated, num_rows)
    return replace(
        ops,
        linear=partial(_linear, ops.linear),
        lookup=partial(_lookup, ops.lookup),
        experts=experts,
    )


def spread(ops: Ops) -> Spread:
    """Tokens over the devices of the axis "tensor", in their order.

    Args:
        ops: operations on a device's own tokens.
    """

    def own(x: Array) -> Array:
        size = x.shape[1] // lax.axis_size(TENSOR)
        return lax.dynamic_slice_in_dim(x, lax.axis_index(TENSOR) * size, size, 1)

    gather = partial(all_gather, axes=TENSOR, axis=1)
    return Spread(ops, own, gather, partial(all_to_all, axes=TENSOR, split=1, concat=2))


def _linear(
    linear: Callable[..., Any], x: Array, *weights: Any, residual: Array | None = None
) -> Any:
    if not isinstance(weights[0], _Split):
        return linear(x, *weights, residual=residual)
    (w,) = weights
    y = linear(x, w.part)
    if isinstance(w, InputSplit):
        y = lax.psum(y, TENSOR)
    else:
        y = lax.all_gather(y, TENSOR, axis=y.ndim - 1, tiled=True)
    return y if residual is None else residual + y


def _lookup(lookup: Callable[..., Array], table: Any, tokens: Array, *, dtype: Any) -> Array:
    """Each device finds the rows of its own tokens, and the sum has all."""
    if not isinstance(table, VocabSplit):
        return lookup(table, tokens, dtype=dtype)
    count = table.shape[0]
    at = tokens - lax.axis_index(TENSOR) * count
    rows = lookup(table.part, jnp.clip(at, 0, count - 1), dtype=dtype)
    mine = (at >= 0) & (at < count)
    return lax.psum(jnp.where(mine[..., None], rows, 0), TENSOR)


def _narrow_experts(
    experts: Callable[..., Array], x: Array, ids: Array, weights: Array, p: Experts, **how: Any
) -> Array:
    """Every device has a part of the width of every expert."""
    if p.b_down is not None:  # it is added once, not by everybody
        b_down = as_array(p.b_down)
        p = replace(p, b_down=jnp.where(lax.axis_index(TENSOR) == 0, b_down, 0))
    return lax.psum(experts(x, ids, weights, p, **how), TENSOR)


def whole_sizes(sizes: Mapping[str, int], parallelism: Parallelism) -> dict[str, int]:
    """Sizes of a model's axes over all devices: a KV head that several need is there for each, and
    devices have equally many places for experts."""
    heads, devices = sizes["kv_heads"], parallelism.expert
    spare = heads < parallelism.tensor and parallelism.tensor % heads == 0
    places = -(-sizes["experts"] // devices) * devices
    return {**sizes, "kv_heads": parallelism.tensor if spare else heads, "experts": places}


def place_of(w: Weight, sizes: Mapping[str, int], parallelism: Parallelism) -> PartitionSpec:
    rules, whole = fitted(PREFILL, parallelism), whole_sizes(sizes, parallelism)
    return spec(w.axes, rules, whole, parallelism.abstract_mesh)


def put_on_mesh(
    w: Weight,
    leaf: Any,
    sizes: Mapping[str, int],
    parallelism: Parallelism,
    mesh: Mesh,
    placement: Placement | None = None,
) -> Any:
    """A leaf (a numpy array, or an `Int8Weight` of them) with each device's share on it.

    Where there are more devices than KV heads, each head is there as often as it is needed; and an
    expert is in every slot that is its own.

    Args:
        placement: of experts, the same in every layer.
    """
    if placement is not None and "experts" in w.axes:
        axis = w.axes.index("experts")
        leaf = jax.tree.map(lambda x: np.take(x, placement.expert_of, axis), leaf)
    if "kv_heads" in w.axes and (copies := parallelism.tensor // sizes["kv_heads"]) > 1:
        axis = w.axes.index("kv_heads")
        leaf = jax.tree.map(lambda x: np.repeat(x, copies, axis), leaf)
    place = place_of(w, sizes, parallelism)

    def share(x: Any) -> jax.Array:
        own = PartitionSpec(*place[: x.ndim])  # scales lack the last axis
        return put(x, NamedSharding(mesh, own))

    return jax.tree.map(share, leaf)
