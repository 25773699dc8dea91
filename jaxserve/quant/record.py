"""What products are given while a model reads calibration text: a sample of rows for each.

The model is written against `Ops`, so it is run as it is, layer after layer and outside jit, with
operations that look at their inputs. A product keeps at most so many rows, drawn over the whole
text, and the products that share an input share its rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxserve.models.attention import packed
from jaxserve.models.ops import Ops
from jaxserve.quant.leaves import Leaves, named
from kernels_pallas.linear import GATES, gated_linear, linear
from kernels_pallas.weight import StackedWeight, as_array
from moe.experts import Experts

TOKENS = 2048
"""Tokens of one forward pass."""

_FEW = 32  # routed rows below which an expert is judged by all tokens
_PAD = 64  # rows of an expert come in multiples of it, or each number of rows were a program


class Sample:
    """The rows with the smallest random numbers of all that were offered."""

    def __init__(self, most: int):
        self._most, self._rows, self._order = most, None, np.empty(0)

    def offer(self, rows: np.ndarray, order: np.ndarray) -> None:
        """Takes what it wants of `rows` [n, K], whose random numbers are `order` [n]."""
        if self._rows is not None:
            rows, order = np.concatenate([self._rows, rows]), np.concatenate([self._order, order])
        best = np.argsort(order, kind="stable")[: self._most]
        self._rows, self._order = rows[best], order[best]

    def divide(self, by: np.ndarray) -> None:
        """Divides the channels [K] of all rows, as a scale that is folded away does."""
        self._rows = (self.rows / by).astype(np.float32)

    @property
    def rows(self) -> np.ndarray:
        assert self._rows is not None
        return self._rows


class Inputs:
    """Rows [n, K] that the products of a model were given, by layer and name.

    An expert's are under the matrix's name and its number; one that was hardly visited has those of
    all tokens.
    """

    def __init__(self) -> None:
        self._samples: dict[tuple[int, str, int | None], Sample] = {}
        self._same: dict[tuple[int, str], tuple[int, str]] = {}

    def rows(self, layer: int, name: str, expert: int | None = None) -> np.ndarray:
        """The rows of a product."""
        return self.sample(layer, name, expert).rows

    def sample(self, layer: int, name: str, expert: int | None = None) -> Sample:
        """The rows of a product as the object that all products with this input share."""
        layer, name = self._same.get((layer, name), (layer, name))
        return self._samples[layer, name, expert]

    def at(self, layer: int, name: str, expert: int | None, most: int) -> Sample:
        """The sample under a product's own name, begun if need be."""
        return self._samples.setdefault((layer, name, expert), Sample(most))

    def share(self, product: tuple[int, str], other: tuple[int, str]) -> None:
        """Says that a product is given what another is."""
        self._same[product] = other

    @property
    def nbytes(self) -> int:
        """Memory of all rows."""
        return sum(sample.rows.nbytes for sample in self._samples.values())


def record(
    leaves: Leaves,
    documents: Sequence[Sequence[int]],
    *,
    rows: int,
    seed: int,
    advance: Callable[[int], None] = lambda tokens: None,
) -> Inputs:
    """Runs the model over documents and returns what its products were given.

    Args:
        rows: most that is kept for a product; of an expert's, its share of as many tokens.
        advance: told how many tokens have been read.
    """
    recorder = _Recorder(leaves, rows, np.random.default_rng(seed))
    for tokens, segments in batches(documents, leaves.cfg.max_len):
        positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
        recorder.read(tokens, segments, positions)
        advance(int((segments > 0).sum()))
    return recorder.inputs


def batches(
    documents: Iterable[Sequence[int]], longest: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Tokens [B, T], a document a row, and 1 where there is one; those of like length together.

    Documents longer than `longest` or `TOKENS` are cut.
    """
    cut = sorted((list(d)[: min(longest, TOKENS)] for d in documents if len(d)), key=len)
    while cut:
        length = len(cut[-1])
        some, cut = cut[-(TOKENS // length) :], cut[: -(TOKENS // length)]
        tokens, segments = np.zeros((2, len(some), length), np.int32)
        for i, document in enumerate(some):
            tokens[i, : len(document)], segments[i, : len(document)] = document, 1
        yield tokens, segments


class _Recorder:
    """Operations that remember; `read` runs the model with them."""

    def __init__(self, leaves: Leaves, rows: int, rng: np.random.Generator):
        self.inputs, self._leaves, self._rows, self._rng = Inputs(), leaves, rows, rng
        self._params = jax.tree.map(jnp.asarray, leaves.tree())
        self._names = {
            id(leaf): (i, name)
            for i, stack in enumerate(self._params.stacks)
            for name, leaf in named(stack).items()
        }
        self._real, self._order = np.empty(0, bool), np.empty(0)

    def read(self, tokens: np.ndarray, segments: np.ndarray, positions: np.ndarray) -> None:
        self._real = segments.reshape(-1) > 0
        self._order = self._rng.random(self._real.sum())
        at = jnp.asarray(positions)
        ops = Ops(
            attend=packed(jnp.asarray(segments), at),
            dtype=jnp.float32,
            linear=self._linear,
            gated_linear=self._gated_linear,
            experts=self._experts,
        )
        model, cfg = self._leaves.family, self._leaves.cfg
        model.forward(cfg, self._params, jnp.asarray(tokens), at, ops, None)

    def _linear(self, x: Array, *weights: Any, residual: Array | None = None) -> Any:
        self._offer(x, weights)
        return linear(x, *weights, residual=residual)

    def _gated_linear(self, x: Array, *weights: Any, activation: str) -> Array:
        self._offer(x, weights)
        return gated_linear(x, *weights, activation=activation)

    def _offer(self, x: Array, weights: Sequence[Any]) -> None:
        first, *others = (self._key(w) for w in weights)
        rows = np.asarray(x, np.float32).reshape(len(self._real), -1)[self._real]
        self.inputs.at(*first, None, self._rows).offer(rows, self._order)
        for other in others:
            self.inputs.share(other, first)

    def _key(self, w: Any) -> tuple[int, str]:
        return self._names[id(w.stack if isinstance(w, StackedWeight) else w)]

    def _experts(
        self, x: Array, ids: Array, weights: Array, p: Experts, *, activation: str
    ) -> Array:
        """The sum of `moe.experts.experts` over real tokens."""
        layer, gate = self._key(p.w_gate)
        _, down = self._key(p.w_down)
        self.inputs.share(self._key(p.w_up), (layer, gate))
        rows, chosen = (np.asarray(a)[self._real] for a in (x, ids))
        shares = np.asarray(weights)[self._real]
        y = np.zeros(rows.shape, np.float32)
        most = max(self._rows * ids.shape[1] // p.w_gate.shape[0], 2 * _FEW)
        for e in range(p.w_gate.shape[0]):
            at, choice = np.nonzero(chosen == e)
            given, order = rows[at], self._order[at]
            hidden, out = _one_expert(p, e, given, activation)
            y[at] += shares[at, choice, None] * out
            if len(at) < _FEW:  # judged by tokens that went elsewhere, too
                given, order = rows[: 2 * _FEW], self._order[: 2 * _FEW] + 1
                hidden, _ = _one_expert(p, e, given, activation)
            self.inputs.at(layer, gate, e, most).offer(given, order)
            self.inputs.at(layer, down, e, most).offer(hidden, order)
        whole = np.zeros(x.shape, np.float32)
        whole[self._real] = y
        return jnp.asarray(whole)


def _one_expert(
    p: Experts, e: int, x: np.ndarray, activation: str
) -> tuple[np.ndarray, np.ndarray]:
    """An expert's hidden activations and its outputs for rows [n, D]."""
    padded = jnp.asarray(np.pad(x, ((0, -len(x) % _PAD), (0, 0))))

    def product(a: Array, w: Any, b: Any) -> Array:
        y = a @ as_array(w)[e].T
        return y if b is None else y + as_array(b)[e]

    gate, up = product(padded, p.w_gate, p.b_gate), product(padded, p.w_up, p.b_up)
    hidden = GATES[activation](gate, up)
    out = product(hidden, p.w_down, p.b_down)
    return np.asarray(hidden)[: len(x)], np.asarray(out)[: len(x)]
