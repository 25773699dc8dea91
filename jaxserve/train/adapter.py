"""What a run trains: all weights, low-rank additions to some, or a prompt of free embeddings."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxserve.errors import ConfigError
from kernels_pallas.weight import LowRankWeight, as_array
from sharding.tree import is_weight


class Adapter(Protocol):
    """Splits a model into what is trained and what is not."""

    def start(self, params: Any, declared: Any, seed: int) -> tuple[Any, Any]:
        """(trainable, frozen) trees for a run that begins with these weights."""
        ...

    def model(self, trainable: Any, frozen: Any) -> Any:
        """The whole model, as a function of what is trained."""
        ...

    def decayed(self, declared: Any, trainable: Any) -> Any:
        """For each trained leaf, whether it decays."""
        ...


@dataclass(frozen=True)
class Full:
    """Every weight is trained."""

    def start(self, params: Any, declared: Any, seed: int) -> tuple[Any, Any]:
        return params, None

    def model(self, trainable: Any, frozen: Any) -> Any:
        return trainable

    def decayed(self, declared: Any, trainable: Any) -> Any:
        """Matrices decay; norms and biases do not."""
        return jax.tree.map(lambda w: w.is_matrix, declared, is_leaf=is_weight)


@dataclass(frozen=True)
class Lora:
    """Low-rank additions to the weights named in `targets`, wherever the tree has one.

    The second factor starts at zero, so a run starts at the model it was given.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]

    def start(self, params: Any, declared: Any, seed: int) -> tuple[Any, Any]:
        rng = np.random.default_rng(seed)
        specs = dict(jax.tree_util.tree_flatten_with_path(declared, is_leaf=is_weight)[0])
        pairs: dict[str, dict[str, Any]] = {}
        for path, w in jax.tree_util.tree_flatten_with_path(params)[0]:
            if (
                _last(path) in self.targets
                and specs[path].is_matrix
                and "layer" in specs[path].axes
            ):
                layers, *out, into = w.shape
                down = rng.standard_normal((layers, self.rank, into), np.float32)
                pairs[_name(path)] = {
                    "down": jnp.asarray(down / into**0.5),
                    "up": jnp.zeros((layers, *out, self.rank), jnp.float32),
                }
        if not pairs:
            layered = (path for path, w in specs.items() if w.is_matrix and "layer" in w.axes)
            names = sorted(set(map(_last, layered)))
            raise ConfigError(
                f"[adapter] targets {list(self.targets)} name no weight; there are "
                f"{', '.join(names)}"
            )
        return pairs, params

    def model(self, trainable: Any, frozen: Any) -> Any:
        scale = self.alpha / self.rank

        def add(path: Any, w: Any) -> Any:
            pair = trainable.get(_name(path))
            return w if pair is None else LowRankWeight(w, pair["down"], pair["up"], scale)

        return jax.tree_util.tree_map_with_path(add, frozen)

    def decayed(self, declared: Any, trainable: Any) -> Any:
        return jax.tree.map(lambda _: True, trainable)


@dataclass(frozen=True)
class SoftPrompt:
    """Embeddings of tokens that stand before every text (Lester et al., 2021).

    The model must have them in its vocabulary: `with_virtual_tokens`. Their rows of the head are
    trained along, since only that keeps the model from saying them.

    Attributes:
        first: the id of the first.
        count: how many there are.
    """

    first: int
    count: int

    def start(self, params: Any, declared: Any, seed: int) -> tuple[Any, Any]:
        own = slice(self.first, self.first + self.count)
        return {name: getattr(params, name)[own] for name in _BY_TOKEN}, params

    def model(self, trainable: Any, frozen: Any) -> Any:
        def put(name: str) -> Array:
            table = getattr(frozen, name)
            return lax.dynamic_update_slice_in_dim(table, trainable[name], self.first, 0)

        return dataclasses.replace(frozen, **{name: put(name) for name in _BY_TOKEN})

    def decayed(self, declared: Any, trainable: Any) -> Any:
        return jax.tree.map(lambda _: False, trainable)


_BY_TOKEN = ("embed", "lm_head")


def with_virtual_tokens(params: Any, first: int, count: int, seed: int) -> Any:
    """The same model with `count` tokens more, from id `first` on, and a head of its own.

    Their embeddings begin as those of random tokens, their rows of the head as zeros.
    """
    end = max(first + count, len(params.embed))
    alike = np.random.default_rng(seed).integers(0, first, count)

    def grown(table: Array, rows: Array) -> Array:
        table = jnp.pad(table, ((0, end - len(table)), (0, 0)))
        return table.at[first : first + count].set(rows)

    head = params.embed if params.lm_head is None else params.lm_head
    embed = grown(params.embed, params.embed[alike])
    head = grown(head, jnp.zeros((count, head.shape[1]), head.dtype))
    return dataclasses.replace(params, embed=embed, lm_head=head)


def merged(params: Any) -> Any:
    """The same model without additions: what is exported."""

    def is_low_rank(w: Any) -> bool:
        return isinstance(w, LowRankWeight)

    return jax.tree.map(as_array, params, is_leaf=is_low_rank)


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path).lstrip(".")


def _last(path: Any) -> str:
    return _name(path).rpartition(".")[2]
