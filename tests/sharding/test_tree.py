"""One declaration gives shape, name, type and first value."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sharding.tree import (
    Weight,
    abstract,
    cut,
    declare,
    initialise,
    is_weight,
    part,
    pytree,
    unstack,
    weight,
)

SIZES = {"embed": 4, "mlp": 6, "experts": 3}


@pytree
class Inner:
    w: Any = weight("mlp embed", "w.weight")
    b: Any = weight("mlp", "w.bias", init="zeros", when="biased")


@pytree
class Outer:
    norm: Any = weight("embed", "norm.weight", init="ones", dtype="float32")
    inner: Any = part(Inner, "inner.")
    extra: Any = part(Inner, "extra.", when="extra")
    loose: Any = None


@dataclass(frozen=True)
class Config:
    biased: bool = True
    extra: bool = False


def test_names_carry_the_prefixes_and_axes_the_stack():
    tree = declare(Outer, Config(), "layers.{layer}.", layers=range(2, 5))
    assert tree.inner.w.name == "layers.{layer}.inner.w.weight"
    assert tree.inner.w.axes == ("layer", "mlp", "embed")
    assert tree.inner.w.shape(SIZES) == (3, 6, 4)
    assert tree.inner.w.layers == range(2, 5)
    assert declare(Outer, Config(), "x.").inner.w.shape(SIZES) == (6, 4)


def test_optional_parts_are_none():
    tree = declare(Outer, Config(biased=False))
    assert tree.inner.b is None
    assert tree.extra is None
    assert tree.loose is None
    assert declare(Outer, Config(extra=True)).extra.w.name == "extra.w.weight"


def test_abstract_and_initialise_agree_on_shapes_and_types():
    tree = declare(Outer, Config(), layers=range(3))
    shapes = abstract(tree, SIZES, jnp.bfloat16)
    values = initialise(tree, SIZES, jnp.bfloat16)
    assert shapes == jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), values)
    assert values.norm.dtype == jnp.float32, "a leaf's own type wins"
    assert values.inner.w.dtype == jnp.bfloat16
    assert np.all(values.norm == 1)
    assert not np.any(values.inner.b)


def test_initial_values_are_seeded_and_scaled_by_what_they_contract():
    tree = {"w": Weight(("mlp", "embed"))}
    sizes = {"mlp": 300, "embed": 400}
    a, b, c = (initialise(tree, sizes, jnp.float32, seed)["w"] for seed in (0, 0, 1))
    np.testing.assert_array_equal(a, b)
    assert not np.array_equal(a, c)
    assert abs(float(jnp.std(a)) * 20 - 1) < 0.02


def test_trees_cross_jit_and_keep_their_class():
    values = initialise(declare(Outer, Config()), SIZES, jnp.float32)
    doubled = jax.jit(lambda t: jax.tree.map(lambda x: 2 * x, t))(values)
    assert isinstance(doubled, Outer)
    np.testing.assert_array_equal(doubled.inner.w, 2 * values.inner.w)
    assert is_weight(Weight(())) and not is_weight(values)


def test_stacks_are_cut_into_parts():
    @pytree
    class Model:
        stacks: tuple[Any, ...] = ()

    cfg = Config()
    stacks = [declare(Outer, cfg, "layers.{layer}.", layers=r) for r in (range(3), range(3, 5))]
    tree = replace(Model(), stacks=tuple(stacks))

    def layers(tree: Any) -> list[range]:
        return [stack.norm.layers for stack in tree.stacks]

    assert layers(cut(tree, [1, 2, 2])) == [range(1), range(1, 3), range(3, 5)]
    assert {w.layers for w in jax.tree.leaves(cut(tree, [2]).stacks, is_leaf=is_weight)} == {
        range(2)
    }
    assert layers(unstack(tree)) == [range(i, i + 1) for i in range(5)]
    assert cut(tree, [3, 2]) == tree and cut(tree, []).stacks == ()
    for sizes in ([4, 1], [3, 3], [0, 3]):
        with pytest.raises(ValueError, match=r"must cut stacks of \[3, 2\] layers"):
            cut(tree, sizes)
