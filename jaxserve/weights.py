"""A model's weights in the form that an engine serves, on its device or its mesh."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxserve.checkpoint import hf
from jaxserve.checkpoint.reward_head import REWARD_HEAD, ROTATED, load_reward_head
from jaxserve.config import EngineConfig
from jaxserve.errors import ConfigError
from jaxserve.models.family import Family
from jaxserve.models.layers import restack
from jaxserve.models.parallel import placed, put_on_mesh
from jaxserve.models.reward_head import RewardHead
from jaxserve.plan import Plan, no_device, serves_int8
from jaxserve.quant import weights as quant
from jaxserve.quant.stored import stored_in_int8
from kernels_pallas.weight import Int8Weight
from sharding.mesh import Parallelism, first_devices, mesh, put
from sharding.probe import probe
from sharding.tree import Weight, cut, initialise, is_weight, unstack


def serving_mesh(parallelism: Parallelism, device: Any) -> Mesh | None:
    """The mesh of a split over several devices.

    Raises:
        ConfigError: there are fewer or none, or a single one was asked for, or what was asked for
            is no device.
    """
    if isinstance(device, str):
        raise ConfigError(
            f"{device=} must be a device of JAX, such as jax.devices()[0]; JAX_PLATFORMS in the "
            "environment chooses between cpu, cuda and tpu"
        )
    if parallelism.num_devices == 1:
        return None
    if device is not None:
        raise ConfigError(
            f"device={device} is one, but {parallelism} asks for {parallelism.num_devices}"
        )
    try:
        devices = first_devices(parallelism.num_devices)
        return mesh(parallelism, probe(devices), devices)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    except (RuntimeError, AssertionError) as error:
        raise no_device(error) from error


def has_reward_head(folder: Path, config: EngineConfig) -> bool:
    """Whether a reward head is asked for, or lies beside the weights."""
    return config.reward_head is not None or (folder / REWARD_HEAD).is_file()


def held_in_int8(
    folder: Path, family: Family, cfg: Any, raw: Mapping[str, Any], config: EngineConfig
) -> Callable[[Weight], bool]:
    """Which leaves a plan with quantization "int8" holds in eight bits.

    All large ones where that is asked for, or where weights are random; of a checkpoint that brings
    int8 by itself those that it stores so, and the output head.

    Raises:
        CheckpointError: the checkpoint's tensors cannot be listed.
    """
    asked = config.quantization == "int8" or config.load_format == "dummy"
    if asked or not serves_int8(raw):
        return quant.is_large
    return stored_in_int8(folder, family, cfg)


@dataclass(frozen=True)
class ServedWeights:
    """Makes trees of weights that the programs of a plan take.

    Attributes:
        folder: of the checkpoint.
        family, cfg: of the model in it.
        mesh: None: they all go to `device`.
        in_int8: which leaves are held in eight bits, if the plan has such.
    """

    folder: Path
    family: Family
    cfg: Any
    config: EngineConfig
    plan: Plan
    device: Any
    mesh: Mesh | None
    in_int8: Callable[[Weight], bool] = quant.is_large

    def reward_head(self) -> RewardHead | None:
        """What judges paths of searches, if the plan has such a thing.

        Raises:
            CheckpointError: the file that was asked for is missing, damaged or of another model.
        """
        if not self.plan.judges:
            return None
        file = self.folder / (self.config.reward_head or REWARD_HEAD)
        rotated = bool(hf.read_config(self.folder).get(ROTATED))
        head = load_reward_head(file, self.cfg.embed, rotated=rotated)
        place = self.device if self.mesh is None else NamedSharding(self.mesh, PartitionSpec())
        return jax.device_put(head, place)

    def load(self) -> Any:
        """The checkpoint's weights, or random ones where that is asked for."""
        plan = self.plan
        if self.config.load_format == "dummy":
            declared = self.family.declare_params(self.cfg)
            declared = unstack(declared) if plan.unrolled else declared
            return self._served(initialise(declared, self.cfg.sizes, plan.dtype, self.config.seed))
        params = hf.load_params(
            self.folder,
            self.family,
            self.cfg,
            plan.dtype,
            unrolled=plan.unrolled,
            in_int8=self._holds_int8,
            rounded=quant.round_to_int8,
            place=self._place,
            progress=self.config.progress,
        )
        return self._with_placement(self._with_own_head(params))

    def _holds_int8(self, w: Weight) -> bool:
        return self.plan.quantization is not None and self.in_int8(w)

    def _place(self, w: Weight, leaf: Any) -> Any:
        """A leaf on the device, or each device's share on the mesh."""
        if self.mesh is None:
            return jax.device_put(leaf, self.device)
        dispatch, sizes = self.plan.dispatch, self.cfg.sizes
        placement = dispatch.layout.initial() if dispatch else None
        return put_on_mesh(w, leaf, sizes, self.plan.parallelism, self.mesh, placement)

    def _with_placement(self, params: Any) -> Any:
        """With tables of where experts live, if they are spread over devices."""
        if self.plan.dispatch is None or self.mesh is None:
            return params
        everywhere = NamedSharding(self.mesh, PartitionSpec())
        placement = self.plan.dispatch.layout.initial(self.cfg.num_layers)
        return placed(params, placement, partial(put, sharding=everywhere))

    def _with_own_head(self, params: Any) -> Any:
        """With an eight-bit copy of a tied table, which products want while lookups want floats."""
        if not self.plan.quantization or params.lm_head is not None:
            return params
        head = quant.round_to_int8(np.asarray(params.embed))
        embed = self.family.declare_params(self.cfg).embed
        return dataclasses.replace(params, lm_head=self._place(embed, head))

    def _served(self, params: Any) -> Any:
        """A tree of floats as it is served; layers of a stack are of one kind."""
        if not self.plan.quantization and self.mesh is None:
            return params

        def leaf(w: Weight, x: Any) -> Any:
            if isinstance(x, Int8Weight):  # as an engine serves it: it has been rounded
                return self._place(w, jax.tree.map(np.asarray, x))
            x = np.asarray(x)
            return self._place(w, quant.round_to_int8(x) if self._holds_int8(w) else x)

        declared = cut(self.family.declare_params(self.cfg), _num_layers(params))
        self._check(declared, params)
        leaves = jax.tree.map(leaf, declared, params, is_leaf=is_weight)
        return self._with_placement(self._with_own_head(leaves))

    def _check(self, declared: Any, params: Any) -> None:
        """Raises ConfigError unless a tree has the leaves that are declared, each in its shape."""
        given = _by_name(params, lambda x: isinstance(x, Int8Weight))
        for name, w in _by_name(declared, is_weight).items():
            leaf, wanted = given.pop(name, None), w.shape(self.cfg.sizes)
            if leaf is None or leaf.shape != wanted:
                raise _misfit(name, leaf, wanted)
        if given:
            raise ConfigError(f"{next(iter(given))} is not served")

    def copied(self, params: Any, served: Any) -> Any:
        """A copy of a tree in the form, the types and the places of the one that is served.

        Raises:
            ConfigError: a leaf is missing or of another shape; the message names it.
        """
        params = _stacked_like(params, served)
        like = served
        if self.plan.quantization and self.family.declare_params(self.cfg).lm_head is None:
            like, params = (dataclasses.replace(tree, lm_head=None) for tree in (served, params))
        if _shapes(params) == _shapes(like):
            params = self._with_own_head(params)  # of the table that came, not of the one before
        else:
            params = self._served(params)
        wanted, given = _by_name(served), _by_name(params)
        for name, old in wanted.items():
            new = given.pop(name, None)
            if new is None or new.shape != old.shape:
                raise _misfit(name, new, old.shape)
        if given:
            raise ConfigError(f"{next(iter(given))} is not served")
        return jax.tree.map(_copied, params, served)


def _by_name(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """The leaves of a tree by where they are, such as "stacks[0].mlp.w_up"."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    return {jax.tree_util.keystr(path).lstrip("."): leaf for path, leaf in leaves}


def _misfit(name: str, leaf: Any, wanted: Sequence[int]) -> ConfigError:
    seen = "missing" if leaf is None else f"of shape {list(leaf.shape)}"
    return ConfigError(f"{name} is {seen}; the engine serves {list(wanted)}")


def _shapes(tree: Any) -> Any:
    """What of a tree says whether it is in the form of another."""
    return jax.tree.structure(tree), [np.shape(leaf) for leaf in jax.tree.leaves(tree)]


def _stacked_like(params: Any, served: Any) -> Any:
    """A tree with its layers in stacks of the sizes that are served."""
    if type(params) is not type(served):
        wanted = type(served).__name__
        raise ConfigError(f"params are a {type(params).__name__}; expected the model's {wanted}")
    if _num_layers(params) == (sizes := _num_layers(served)):
        return params
    try:
        return restack(jax.tree.map(np.asarray, params), sizes)
    except ValueError as error:
        raise ConfigError(f"the layers of params cannot be stacked as {sizes}: {error}") from None


def _num_layers(params: Any) -> list[int]:
    """Layers of each stack."""
    return [len(jax.tree.leaves(stack)[0]) for stack in params.stacks]


def _copied(x: Any, old: jax.Array) -> jax.Array:
    """x in another buffer, of the type and in the place of `old`, without a program: none may be
    compiled while an engine serves."""
    if x.dtype == old.dtype:
        return jax.device_put(x, old.sharding, may_alias=False)
    host = np.asarray(x)
    out = hf.aligned_empty(host.shape, np.dtype(old.dtype))
    out[...] = host.astype(old.dtype)
    return jax.device_put(out, old.sharding)
