"""A model's weights by name, layer by layer, so that rules need not know the families' classes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxserve.models.family import Family
from kernels_pallas.weight import Int8Weight
from sharding.tree import Weight, is_weight, unstack

Layer = dict[str, Any]
"""Leaves of one layer, without the layer axis: "attn.wq" -> float32 [heads, head_dim, embed]."""


@dataclass
class Leaves:
    """All weights of a model; changed in place.

    Attributes:
        cfg: the family's config; it changes where a tied head gets weights of its own.
        outer: embed, final_norm and lm_head, as far as they are there.
        layers: one dict for each layer.
        dtype: in which what stays in floats will be stored; here it is float32.
    """

    family: Family
    cfg: Any
    outer: Layer
    layers: list[Layer]
    dtype: np.dtype

    @classmethod
    def of(cls, family: Family, cfg: Any, params: Any, dtype: Any = "float32") -> Leaves:
        """Takes an unrolled tree apart; arrays are not copied."""
        outer = {name: x for name, x in _outer(params).items() if x is not None}
        layers = [{k: x[0] for k, x in named(stack).items()} for stack in params.stacks]
        return cls(family, cfg, outer, layers, np.dtype(dtype))

    def declared(self) -> Any:
        """The tree of `Weight`, a stack for each layer."""
        return unstack(self.family.declare_params(self.cfg))

    def specs(self) -> list[dict[str, Weight]]:
        """What is declared of each layer's leaves."""
        return [named(stack) for stack in self.declared().stacks]

    def tree(self) -> Any:
        """The unrolled tree of these weights."""
        declared = self.declared()
        stacks = tuple(
            jax.tree.unflatten(jax.tree.structure(stack, is_leaf=is_weight), map(_stacked, leaves))
            for stack, leaves in zip(declared.stacks, self._ordered(declared), strict=True)
        )
        outer = {name: self.outer.get(name) for name in _outer(declared)}
        return dataclasses.replace(declared, stacks=stacks, **outer)

    def _ordered(self, declared: Any) -> Iterator[list[Any]]:
        for stack, layer in zip(declared.stacks, self.layers, strict=True):
            yield [layer[name] for name in named(stack)]


def named(stack: Any) -> dict[str, Any]:
    """Leaves by dotted names, in the tree's order."""
    found = jax.tree_util.tree_flatten_with_path(stack, is_leaf=is_weight)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in found}


def _outer(tree: Any) -> dict[str, Any]:
    return {f.name: getattr(tree, f.name) for f in dataclasses.fields(tree) if f.name != "stacks"}


def _stacked(x: Any) -> Any:
    if isinstance(x, Int8Weight):
        return Int8Weight(x.values[None], x.scale[None])
    return x[None]


def readers(norm: str, specs: Mapping[str, Weight]) -> list[str]:
    """Matrices of the layer that take in what "attn_norm" or "mlp_norm" puts out."""
    part = norm.removesuffix("norm").replace("_", ".")
    return [
        name
        for name, w in specs.items()
        if name.startswith(part) and w.axes[-1] == "embed" and w.init == "normal"
        and not w.name.endswith("bias") and len(w.axes) > 2
    ]  # fmt: skip
