"""Where named axes lie: for weights of every family's tree, and for activations."""

from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from sharding.hardware import named
from sharding.mesh import AXES, Parallelism, mesh
from sharding.rules import (
    DECODE,
    PREFILL,
    TRAIN,
    Rule,
    Rules,
    fitted,
    local_sizes,
    shardings,
    spec,
)
from sharding.tree import Weight, declare, initialise, part, pytree, weight

SIZES = {
    "vocab": 64, "embed": 32, "mlp": 48, "heads": 8, "kv_heads": 2, "head_dim": 4,
    "experts": 16, "expert_mlp": 24, "batch": 32, "pages": 64, "sequence": 16,
}  # fmt: skip
CACHE = ("layer", "pages", "kv_heads", "head_dim")


def shape(data: int, expert: int, tensor: int) -> AbstractMesh:
    return AbstractMesh((data, expert, tensor), AXES)


@pytree
class Experts:
    w_up: Any = weight("experts expert_mlp embed", "{expert}.up_proj.weight")


@pytree
class Moe:
    router: Any = weight("experts embed", "gate.weight")
    experts: Experts = part(Experts, "experts.")


@pytree
class Layer:
    wq: Any = weight("heads head_dim embed", "q_proj.weight")
    wk: Any = weight("kv_heads head_dim embed", "k_proj.weight")
    wo: Any = weight("embed heads*head_dim", "o_proj.weight")
    norm: Any = weight("embed", "norm.weight", init="ones")
    missing: Any = weight("embed", "bias", when="bias")
    mlp: Moe = part(Moe, "mlp.")


CFG = SimpleNamespace(bias=False)


@pytest.mark.parametrize(
    "axes, rules, expected",
    [
        ("batch sequence residual", DECODE, (("data", "expert"), None, None)),
        ("batch sequence residual", PREFILL, (("data", "expert"), "tensor", None)),
        ("heads head_dim embed", DECODE, ("tensor", None, None)),
        ("heads head_dim embed", PREFILL, ("tensor", None, None)),
        ("heads head_dim embed", TRAIN, ("tensor", None, "data")),
        ("embed heads*head_dim", DECODE, (None, "tensor")),
        ("embed heads*head_dim", PREFILL, (None, None)),  # after heads went back to tokens
        ("mlp embed", DECODE, ("tensor", None)),
        ("mlp embed", PREFILL, (None, None)),
        ("vocab embed", DECODE, ("tensor", None)),
        ("layer experts expert_mlp embed", DECODE, (None, ("expert", "tensor"), None, None)),
        ("layer experts expert_mlp embed", TRAIN, (None, ("expert", "tensor"), None, "data")),
        ("routes embed", DECODE, (None, None)),
        (" ".join(CACHE), DECODE, (None, ("data", "expert"), "tensor", None)),
    ],
)
def test_where_axes_lie(axes: str, rules: Rules, expected: tuple):
    assert spec(axes.split(), rules, SIZES, shape(2, 4, 2)) == PartitionSpec(*expected)


def test_keys_of_few_heads_are_replicated():
    assert spec(CACHE, DECODE, SIZES, shape(1, 1, 2))[2] == "tensor"
    assert spec(CACHE, DECODE, SIZES, shape(1, 1, 4))[2] is None
    with pytest.raises(ValueError, match=r"kv_heads=6 does not divide into 4 .* nearest .* is 3"):
        spec(CACHE, DECODE, SIZES | {"kv_heads": 6}, shape(1, 1, 4))


def test_other_axes_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="heads=8 does not divide into 16 parts over tensor"):
        spec(("heads",), DECODE, SIZES, shape(1, 1, 16))
    with pytest.raises(ValueError, match=r"experts=16 .* 12 parts over expert·tensor; .* is 8"):
        spec(("experts",), DECODE, SIZES, shape(1, 4, 3))


def test_what_a_table_does_not_know_is_refused():
    with pytest.raises(ValueError, match="no rule for axis 'head'; the nearest is 'heads', known"):
        spec(("head", "embed"), DECODE, SIZES, shape(1, 1, 2))
    with pytest.raises(ValueError, match="the size of 'heads' is not given; known are embed"):
        spec(("heads",), DECODE, {"embed": 2}, shape(1, 1, 2))
    with pytest.raises(ValueError, match=r"more than one axis is split over \['tensor'\]"):
        spec(("heads", "mlp"), DECODE, SIZES, shape(1, 1, 2))
    with pytest.raises(ValueError, match="only the first part of a combined axis"):
        spec(("head_dim*heads",), DECODE, SIZES, shape(1, 1, 2))


def test_tables_are_frozen():
    for table in (DECODE, PREFILL, TRAIN, fitted(DECODE, Parallelism())):
        with pytest.raises(TypeError):
            table["heads"] = Rule()  # type: ignore[index]


def test_a_split_leaves_out_what_it_did_not_ask_for():
    by_width = fitted(DECODE, Parallelism(data=2, tensor=2))
    expected = PartitionSpec(None, "tensor", None)
    assert spec(["experts", "expert_mlp", "embed"], by_width, SIZES, shape(2, 1, 2)) == expected
    assert fitted(PREFILL, Parallelism(expert=2, tensor=2)) == DECODE
    assert fitted(PREFILL, Parallelism(expert=2, tensor=2, sequence=2)) == PREFILL
    assert fitted(TRAIN, Parallelism(expert=2, tensor=2)) == TRAIN
    with pytest.raises(ValueError, match=r"sequence=2: this table keeps .* take PREFILL"):
        fitted(DECODE, Parallelism(tensor=2, sequence=2))


def test_a_combined_axis_that_stays_whole_has_a_size_of_its_own():
    sizes = SIZES | {"v_dim": 4}
    w = Weight(("embed", "heads*v_dim"))
    by_tokens = local_sizes(PREFILL, sizes, shape(1, 1, 2))
    assert (by_tokens["heads"], w.shape(by_tokens)) == (4, (32, 32))
    assert w.shape(local_sizes(DECODE, sizes, shape(1, 1, 2))) == (32, 16)


def test_a_tree_of_shardings():
    tree = declare(Layer, CFG, "model.layers.{layer}.", layers=range(3))
    there = shape(1, 4, 2)
    placed = shardings(tree, DECODE, SIZES, there)
    assert placed.wq.spec == PartitionSpec(None, "tensor", None, None)
    assert placed.wo.spec == PartitionSpec(None, None, "tensor")
    assert placed.missing is None
    assert placed.mlp.router.spec == PartitionSpec(None, None, None)  # scores every expert
    assert placed.mlp.experts.w_up.spec == PartitionSpec(None, ("expert", "tensor"), None, None)
    with pytest.raises(ValueError, match=r"layers.\{layer\}.q_proj.weight: heads=8 does not"):
        shardings(tree, DECODE, SIZES, shape(1, 1, 16))


@pytest.mark.mesh
def test_weights_are_placed_in_parts():
    parallelism = Parallelism(data=4, expert=8, tensor=2)
    there = mesh(parallelism, named("cpu:8"))
    tree = declare(Layer, CFG, layers=range(2))
    params = initialise(tree, SIZES, np.float32)
    placed = jax.device_put(params, shardings(tree, fitted(DECODE, parallelism), SIZES, there))
    experts = placed.mlp.experts.w_up
    assert experts.addressable_shards[0].data.shape == (2, 2, 24, 32)
    assert placed.mlp.router.addressable_shards[0].data.shape == (2, 16, 32)
    # Expert e * 2 + t lies on device t of group e, in the order of devices.
    first = {s.device.id: s.index[1].start or 0 for s in experts.addressable_shards}
    assert first == {device: 2 * device for device in range(8)}


def test_every_axis_that_models_declare_has_a_rule():
    from jaxserve.models import decoder, deepseek_v3_mtp, gemma3_text, gpt_oss, mixtral, mla
    from moe import experts

    modules = (decoder, deepseek_v3_mtp, gemma3_text, gpt_oss, mixtral, mla, experts)
    declared: set[str] = set()
    for module in modules:
        for cls in vars(module).values():
            for field in getattr(cls, "__dataclass_fields__", {}).values():
                leaf = field.metadata.get("weight")
                if leaf is not None and isinstance(leaf.weight, Weight):
                    declared.update(leaf.weight.axes)
    assert {"heads", "heads*v_dim", "experts", "vocab", "kv_row", "two_states"} <= declared
    sizes = dict.fromkeys({part for axis in declared for part in axis.split("*")}, 16)
    for table in (TRAIN, PREFILL, DECODE):
        for axis in declared:
            spec((axis,), table, sizes, shape(2, 4, 2))
