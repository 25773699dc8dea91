"""A weight is declared once: its axes, its name in a checkpoint and its first value.

Shape, placement, initialisation and loading all read that one line::

    @pytree
    class Mlp:
        w_up: Array = weight("mlp embed", "up_proj.weight")

    declare(Mlp, cfg, "model.layers.{layer}.mlp.")      # a tree of Weight
    abstract(tree, sizes, jnp.bfloat16)                  # a tree of ShapeDtypeStruct
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar, dataclass_transform

import jax
import numpy as np

C = TypeVar("C", bound=type)


@dataclass(frozen=True)
class Weight:
    """What is known of one leaf before it has a value.

    Attributes:
        axes: a name for each dimension, outermost first; "heads*head_dim" is both in one.
        name: its tensor in a Hugging Face checkpoint; `{layer}` and `{expert}` are filled in for
            the axes "layer" and "experts". Empty: not stored there.
        init: "normal", "ones" or "zeros".
        read: makes one tensor (of the axes that `name` does not enumerate) out of the checkpoint
            where its layout is not ours: `read(get, name, cfg)` with `get(name) -> np.ndarray`.
        also: further names under which a checkpoint has the same tensor.
        write: the way back: `write(tensors, name, cfg, array)` puts the leaf's part of a tensor
            into the dict `tensors`, which another leaf may have begun.
        dtype: its element type, where the tree's would be too narrow.
        layers: numbers of the layers that the leaf stacks along its "layer" axis.
    """

    axes: tuple[str, ...]
    name: str = ""
    init: str = "normal"
    read: Callable[..., np.ndarray] | None = None
    write: Callable[..., None] | None = None
    dtype: str | None = None
    layers: range = range(0)
    also: tuple[str, ...] = ()

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The leaf's shape, given the size of every axis but "layer".

        A combined axis may have a size of its own, as where its parts are split and it is not.
        """

        def size(axis: str) -> int:
            return len(self.layers) if axis == "layer" else sizes[axis]

        def whole(axis: str) -> int:
            return sizes[axis] if axis in sizes else math.prod(map(size, axis.split("*")))

        return tuple(map(whole, self.axes))

    @property
    def is_matrix(self) -> bool:
        """Whether products contract its last axis; not so for norms, biases and other vectors."""
        counted = {"layer"} | ({"experts"} if "{expert}" in self.name else set())
        axes = [axis for axis in self.axes if axis not in counted]
        return len(axes) > 1 and self.init == "normal" and not self.name.endswith("bias")


@dataclass(frozen=True)
class _Declared:
    weight: Weight
    when: str | None


@dataclass(frozen=True)
class _Part:
    cls: type
    prefix: str
    when: str | None


def weight(
    axes: str,
    name: str = "",
    *,
    init: str = "normal",
    when: str | None = None,
    read: Callable[..., np.ndarray] | None = None,
    write: Callable[..., None] | None = None,
    dtype: str | None = None,
) -> Any:
    """Declares a leaf; with `when`, it is None unless that attribute of the config is true."""
    spec = _Declared(Weight(tuple(axes.split()), name, init, read, write, dtype), when)
    return dataclasses.field(metadata={"weight": spec})


def part(cls: type, prefix: str = "", *, when: str | None = None) -> Any:
    """Declares a sub-tree whose checkpoint names start with `prefix`."""
    return dataclasses.field(metadata={"part": _Part(cls, prefix, when)})


@dataclass_transform(field_specifiers=(weight, part))
def pytree(cls: C) -> C:
    """A frozen dataclass that crosses `jax.jit`."""
    return jax.tree_util.register_dataclass(dataclass(frozen=True)(cls))  # type: ignore[return-value]


def declare(cls: type, cfg: Any, prefix: str = "", *, layers: range | None = None) -> Any:
    """A tree of `Weight` for `cls`; undeclared fields become None and are the caller's to fill.

    Args:
        layers: the tree is a stack of these layers, so every leaf gains a leading "layer" axis.
    """

    def leaf(d: _Declared) -> Weight | None:
        if d.when is not None and not getattr(cfg, d.when):
            return None
        axes = d.weight.axes if layers is None else ("layer", *d.weight.axes)
        name = prefix + d.weight.name if d.weight.name else ""
        return dataclasses.replace(d.weight, axes=axes, name=name, layers=layers or range(0))

    def sub(p: _Part) -> Any:
        if p.when is not None and not getattr(cfg, p.when):
            return None
        return declare(p.cls, cfg, prefix + p.prefix, layers=layers)

    def field(f: dataclasses.Field) -> Any:
        if "weight" in f.metadata:
            return leaf(f.metadata["weight"])
        return sub(f.metadata["part"]) if "part" in f.metadata else None

    return cls(**{f.name: field(f) for f in dataclasses.fields(cls)})


def is_weight(x: Any) -> bool:
    return isinstance(x, Weight)


def unstack(tree: Any) -> Any:
    """A declared tree whose `stacks` all hold one layer: they are unrolled instead of scanned."""
    return cut(tree, [1] * sum(map(len, _layers(tree))))


def cut(tree: Any, sizes: Sequence[int]) -> Any:
    """A declared tree whose `stacks` are parts of its own: of the first layers, so many each.

    Raises:
        ValueError: a part would join layers of two stacks, or go beyond the last.
    """
    layers = [(stack, i) for stack, r in zip(tree.stacks, _layers(tree), strict=True) for i in r]
    stacks, first = [], 0
    for size in sizes:
        some = layers[first : first + size]
        if size < 1 or len(some) < size or any(stack is not some[0][0] for stack, _ in some):
            raise ValueError(
                f"sizes {tuple(sizes)} must cut stacks of {[*map(len, _layers(tree))]} layers"
            )
        leaf = partial(dataclasses.replace, layers=range(some[0][1], some[-1][1] + 1))
        stacks.append(jax.tree.map(leaf, some[0][0], is_leaf=is_weight))
        first += size
    return dataclasses.replace(tree, stacks=tuple(stacks))


def _layers(tree: Any) -> list[range]:
    """Numbers of the layers of each stack."""
    return [jax.tree.leaves(stack, is_leaf=is_weight)[0].layers for stack in tree.stacks]


def abstract(tree: Any, sizes: Mapping[str, int], dtype: Any) -> Any:
    """The tree with each `Weight` as a `jax.ShapeDtypeStruct`."""
    return jax.tree.map(
        lambda w: jax.ShapeDtypeStruct(w.shape(sizes), w.dtype or dtype), tree, is_leaf=is_weight
    )


def initialise(tree: Any, sizes: Mapping[str, int], dtype: Any, seed: int = 0) -> Any:
    """Random values for a declared tree, drawn on the host leaf by leaf.

    "normal" is scaled down by the square root of the last axis, along which weights contract.
    """
    rng = np.random.default_rng(seed)

    def draw(w: Weight) -> jax.Array:
        shape = w.shape(sizes)
        if w.init == "normal":
            value = rng.standard_normal(shape, np.float32) / shape[-1] ** 0.5
        else:
            value = np.full(shape, float(w.init == "ones"))
        return jax.device_put(value.astype(w.dtype or dtype))

    return jax.tree.map(draw, tree, is_leaf=is_weight)
