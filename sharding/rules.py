"""Where each named axis of a weight or an activation lies: logical axis -> axes of the mesh.

Models name axes once (`weight("heads head_dim embed")`) and know no mesh; these tables are the
whole of a layout. A table describes the full form, and `fitted` leaves out what a split has not
asked for::

    rules = fitted(DECODE, parallelism)
    placed = shardings(declared, rules, cfg.sizes, mesh)  # a tree of NamedSharding
    spec(("batch", "residual"), rules, {"batch": 64}, mesh)
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from sharding.mesh import Parallelism
from sharding.tree import is_weight


@dataclass(frozen=True)
class Rule:
    """Where one logical axis lies.

    Attributes:
        axes: of the mesh, over which it is split, outermost first; () for whole everywhere.
        few: an axis that has fewer entries than parts is then replicated, instead of refused.
        uneven: so is one that the parts do not divide.
    """

    axes: tuple[str, ...] = ()
    few: bool = False
    uneven: bool = False


Rules = Mapping[str, Rule]

_WHOLE = Rule()
_TENSOR = Rule(("tensor",))
_BATCH = Rule(("data", "expert"))
_EXPERTS = Rule(("expert", "tensor"))

_SERVING: dict[str, Rule] = {
    # Activations. The cache is split as what writes it: pages with rows, and keys with heads.
    "batch": _BATCH,
    "pages": _BATCH,
    "sequence": _WHOLE,
    "residual": _WHOLE,
    # Attention. Heads are split, and what comes out of them is summed over "tensor". Keys of fewer
    # heads than devices are on all of them.
    "heads": _TENSOR,
    "kv_heads": Rule(("tensor",), few=True),
    "head_dim": _WHOLE,
    "nope_dim": _WHOLE,
    "v_dim": _WHOLE,
    "q_lora": _WHOLE,  # latents are small, and each device of the tensor axis makes its own
    "kv_lora": _WHOLE,
    "kv_row": _WHOLE,
    # MLPs.
    "mlp": _TENSOR,
    "shared_mlp": _TENSOR,
    "experts": _EXPERTS,
    "expert_mlp": _WHOLE,
    "routes": _WHOLE,  # an expert's score, which every token's device computes
    # The rest.
    "vocab": Rule(("tensor",), uneven=True),
    "embed": _WHOLE,
    "two_states": _WHOLE,
    "layer": _WHOLE,
}
_BY_TOKENS = {
    # Outside of attention, devices of the tensor axis have tokens of their own: each needs whole
    # weights there. The output projection follows an all-to-all from heads to tokens.
    "sequence": _TENSOR,
    "heads*head_dim": _WHOLE,
    "heads*v_dim": _WHOLE,
    "mlp": _WHOLE,
    "shared_mlp": _WHOLE,
}

DECODE: Rules = MappingProxyType(_SERVING)
"""Rows over replicas, heads over "tensor", experts over all that share a batch."""

PREFILL: Rules = MappingProxyType(_SERVING | _BY_TOKENS)
"""Tokens of a prompt over "tensor", but for attention: stages of the specification's section 7."""

TRAIN: Rules = MappingProxyType(_SERVING | {"embed": Rule(("data",))})
"""As DECODE, with weights (and so optimiser states) split over replicas as well."""


def fitted(rules: Rules, parallelism: Parallelism) -> Rules:
    """The table for a split: without experts or tokens being spread where they are not."""
    table = dict(rules)
    if parallelism.expert == 1:
        table |= {"experts": _WHOLE, "expert_mlp": _TENSOR}
    if parallelism.sequence == 1:
        by_heads = {name: _SERVING[name] for name in _BY_TOKENS if name in _SERVING}
        table = {name: rule for name, rule in table.items() if name not in _BY_TOKENS} | by_heads
    elif rules["sequence"] != _TENSOR:
        raise ValueError(
            f"sequence={parallelism.sequence}: this table keeps the tokens of a row together; "
            "take PREFILL, or sequence=1"
        )
    return MappingProxyType(table)


def spec(
    axes: Sequence[str], rules: Rules, sizes: Mapping[str, int], mesh: Mesh | AbstractMesh
) -> PartitionSpec:
    """How an array with these axes is split.

    "heads*head_dim" lies as its first part does, unless the table has a rule for it as a whole.

    Args:
        sizes: of every axis that is split, as `Config.sizes` has them.

    Raises:
        ValueError: an axis without a rule or a size, one that the mesh does not divide, or two that
            want the same axis of the mesh.
    """
    entries = [_entry(axis, rules, sizes, mesh) for axis in axes]
    used = [name for entry in entries for name in entry]
    if twice := {name for name in used if used.count(name) > 1}:
        raise ValueError(f"{' '.join(axes)}: more than one axis is split over {sorted(twice)}")
    return PartitionSpec(*(_plain(entry) for entry in entries))


def local_sizes(
    rules: Rules, sizes: Mapping[str, int], mesh: Mesh | AbstractMesh
) -> dict[str, int]:
    """What one device has of every axis. Where devices outnumber heads, each has one to itself.

    A combined axis that the table keeps whole, although its parts are split, is there by name.

    Raises:
        ValueError: as `spec`.
    """

    def part(axis: str) -> int:
        names = _entry(axis, rules, sizes, mesh) if axis in rules and sizes[axis] else ()
        return sizes[axis] // math.prod(mesh.shape[name] for name in names)

    combined = {
        axis: math.prod(sizes[name] for name in axis.split("*"))
        for axis, rule in rules.items()
        if "*" in axis and not rule.axes and set(axis.split("*")) <= set(sizes)
    }
    return {**sizes, **{axis: part(axis) for axis in sizes}, **combined}


def shardings(tree: Any, rules: Rules, sizes: Mapping[str, int], mesh: Mesh | AbstractMesh) -> Any:
    """A declared tree (`sharding.tree.declare`) with a NamedSharding for each `Weight`.

    "experts" are split within a part of that name. Elsewhere, as in a router, it counts scores, and
    lies as "routes".
    """

    def place(path: tuple[Any, ...], weight: Any) -> NamedSharding:
        axes = weight.axes
        if "experts" not in {getattr(key, "name", None) for key in path}:
            axes = tuple("routes" if axis == "experts" else axis for axis in axes)
        try:
            return NamedSharding(mesh, spec(axes, rules, sizes, mesh))
        except ValueError as error:
            where = weight.name or jax.tree_util.keystr(path)
            raise ValueError(f"{where}: {error}") from error

    return jax.tree_util.tree_map_with_path(place, tree, is_leaf=is_weight)


def _entry(
    axis: str, rules: Rules, sizes: Mapping[str, int], mesh: Mesh | AbstractMesh
) -> tuple[str, ...]:
    """Axes of the mesh over which one dimension is split."""
    rule = _rule(axis, rules)
    if not rule.axes:
        return ()
    first = axis.split("*")[0]
    if first not in sizes:
        raise ValueError(f"the size of {first!r} is not given; known are {', '.join(sizes)}")
    parts, size = math.prod(mesh.shape[name] for name in rule.axes), sizes[first]
    if size % parts == 0:
        return rule.axes
    if rule.uneven or (rule.few and size < parts):
        return ()
    workable = [n for n in range(1, size + 1) if size % n == 0]
    near = min(workable, key=lambda n: (abs(n - parts), n))
    also = f", or is replicated over more than {size}" if rule.few else ""
    raise ValueError(
        f"{first}={size} does not divide into {parts} parts over {'·'.join(rule.axes)}; "
        f"the nearest that does is {near}{also}"
    )


def _rule(axis: str, rules: Rules) -> Rule:
    if axis in rules:
        return rules[axis]
    names = axis.split("*")
    for name in names:
        if name not in rules:
            near = difflib.get_close_matches(name, rules, 1, 0.0)[0]
            raise ValueError(
                f"no rule for axis {name!r}; the nearest is {near!r}, known are {', '.join(rules)}"
            )
    if any(rules[name].axes for name in names[1:]):
        raise ValueError(f"{axis}: only the first part of a combined axis can be split")
    return rules[names[0]]


def _plain(entry: tuple[str, ...]) -> str | tuple[str, ...] | None:
    return entry if len(entry) > 1 else entry[0] if entry else None
