"""Which weights of a checkpoint in int8 are held as they are stored.

What its publisher kept in floats stays in floats. Layers of one stack may differ in that, so the
loader cuts stacks where they do. Weights that one operation takes are of one kind, which vLLM asks
of a checkpoint, too; where they are not, all of them are held in floats, the more exact of both.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from jaxserve.checkpoint.hf import tensor_names
from jaxserve.checkpoint.safetensors import Shards
from jaxserve.models.family import Family
from jaxserve.quant.weights import is_head, is_large
from sharding.tree import Weight, is_weight, unstack

log = logging.getLogger(__name__)

_TOGETHER = {
    "q_proj": "qkv",
    "k_proj": "qkv",
    "v_proj": "qkv",
    "gate_proj": "mlp",
    "up_proj": "mlp",
}


def stored_in_int8(folder: Path, family: Family, cfg: Any) -> Callable[[Weight], bool]:
    """Says of leaves, of one layer or of several, whether they are held in int8.

    An output head is, however it is stored.

    Raises:
        CheckpointError: the folder has no readable tensors.
    """
    tensors = Shards(folder).tensors
    operands = defaultdict[tuple[str, int], list[Weight]](list)
    for w in jax.tree.leaves(unstack(family.declare_params(cfg)), is_leaf=is_weight):
        if is_large(w) and not is_head(w):
            operands[_operation(w), _layer(w)].append(w)
    found, mixed = set[tuple[str, int]](), list[str]()
    for weights in operands.values():
        names = [name for w in weights for _, name in tensor_names(w, w.shape(cfg.sizes))]
        rounded = [n for n in names if n in tensors and tensors[n].dtype.name == "int8"]
        if len(rounded) == len(names) and not any(w.read for w in weights):
            found |= {(w.name, _layer(w)) for w in weights}
        else:
            mixed += rounded
    if mixed:
        log.warning(
            "%s: %d weights are stored in int8, such as %s, and others of the same product are "
            "not: they are held in floats", folder, len(mixed), mixed[0],
        )  # fmt: skip

    def held(w: Weight) -> bool:
        return is_head(w) or all((w.name, i) in found for i in w.layers or (-1,))

    return held


def _operation(w: Weight) -> str:
    """The product, or the experts, that a weight is for."""
    if "{expert}" in w.name:
        return w.name.split("{expert}")[0]
    module, _, last = w.name.removesuffix(".weight").rpartition(".")
    return f"{module}.{_TOGETHER.get(last, last)}"


def _layer(w: Weight) -> int:
    return w.layers[0] if w.layers else -1
