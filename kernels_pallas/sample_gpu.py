"""`draw` on Hopper: a warpgroup searches the thresholds of a row, which stays in the L2 cache.

Scores of a large vocabulary do not fit into shared memory, so each round of the search reads them
again, computes probabilities, and compares these with three thresholds: two bits per round. The
rounds of top-k end as soon as exactly k are left.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.draw import COLDEST
from kernels_pallas.op import UnsupportedError, refuse_no_rows, tried
from kernels_pallas.softmax import LOG2E

_ABOVE_ONE = 0x3F800001  # bits of the float after 1: probabilities relative to the largest are <= 1
_THREADS = 128  # of a warpgroup
_WORDS = 4  # floats that a thread loads at once


@dataclass(frozen=True)
class GpuTile:
    """vocab: entries of a row that are read at a time."""

    vocab: int = tried(2048, 1024, 4096)


def gpu(
    scores: Array, u: Array, temperature: Array, top_k: Array, top_p: Array, min_p: Array, *,
    tile: GpuTile | None = None, interpret: Any = False,
) -> Array:  # fmt: skip
    """`draw` as a Hopper kernel.

    Raises:
        UnsupportedError: scores have no rows or are not float32, or V is less than 128 or no
            multiple of 4.
    """
    R, V = scores.shape
    refuse_no_rows(R)
    if scores.dtype != jnp.float32:
        raise UnsupportedError(f"scores are {scores.dtype}, and must be float32")
    if V % _WORDS or V < _THREADS:
        raise UnsupportedError(f"{V=} must be a multiple of {_WORDS}, from {_THREADS} on: pad it")
    width = min((tile or GpuTile()).vocab, V // _THREADS * _THREADS)
    return plgpu.kernel(
        partial(_kernel, width=width),
        out_type=jax.ShapeDtypeStruct((R,), jnp.int32),
        grid=(R,),
        grid_names=("row",),
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
        interpret=interpret,
        kernel_name="sample",
    )(scores, u, temperature, top_k, top_p, min_p)


class _Scores(NamedTuple):
    """One row of scores, read in parts of `width` entries.

    Attributes:
        ref: [R, V].
        place: [width]: 0, 1, 2, and so on.
        zeros: [width], of float32.
    """

    ref: Any
    row: Array
    width: int
    place: Array
    zeros: Array

    @property
    def num_parts(self) -> int:
        return -(-self.ref.shape[1] // self.width)

    def begin(self, i: Array) -> Array:
        """The first entry that part i reads: the last part overlaps the one before it."""
        return jnp.minimum(i * self.width, self.ref.shape[1] - self.width)

    def part(self, i: Array) -> Array:
        """Scores of part i; -inf for those that the part before it has."""
        x = self.ref[self.row, pl.ds(self.begin(i), self.width)]
        return jnp.where(self.begin(i) + self.place >= i * self.width, x, -jnp.inf)

    def max(self) -> Array:
        """The largest score of the row."""

        def add(i: Array, found: Array) -> Array:
            return jnp.maximum(found, self.part(i))

        return jnp.max(lax.fori_loop(0, self.num_parts, add, self.zeros - jnp.inf))


class _Probabilities(NamedTuple):
    """Probabilities relative to the largest one, after the temperature and min-p.

    Attributes:
        slope: LOG2E / temperature.
    """

    scores: _Scores
    row_max: Array
    slope: Array
    min_p: Array

    def part(self, i: Array) -> Array:
        """Those of part i [width]."""
        p = jnp.exp2((self.scores.part(i) - self.row_max) * self.slope)
        return jnp.where(p >= self.min_p, p, 0.0)

    def kept(self, i: Array, low: Array) -> Array:
        """Those of part i [width] whose bits are at least `low`, and 0 for the others."""
        p = self.part(i)
        return jnp.where(lax.bitcast_convert_type(p, jnp.int32) >= low, p, 0.0)

    def sums(self, thresholds: list[Array], what: Callable[[Array], Array]) -> list[Array]:
        """Sums of `what` over the probabilities whose bits reach each threshold."""

        def add(i: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
            p = self.part(i)
            bits, x = lax.bitcast_convert_type(p, jnp.int32), what(p)
            return tuple(
                total + jnp.where(bits >= low, x, 0.0)
                for low, total in zip(thresholds, sums, strict=True)
            )

        zeros = (self.scores.zeros,) * len(thresholds)
        return [jnp.sum(x) for x in lax.fori_loop(0, self.scores.num_parts, add, zeros)]


def _kernel(
    scores_ref, u_ref, temperature_ref, top_k_ref, top_p_ref, min_p_ref, token_ref, *, width: int
):  # fmt: skip
    row = lax.axis_index("row")
    place = lax.broadcasted_iota(jnp.int32, (width,), 0)
    scores = _Scores(scores_ref, row, width, place, jnp.zeros((width,), jnp.float32))
    row_max = scores.max()
    slope = LOG2E / jnp.maximum(temperature_ref[row], COLDEST)
    min_p, k, top_p = min_p_ref[row], top_k_ref[row], top_p_ref[row]
    p = _Probabilities(scores, row_max, slope, min_p)
    low = _highest(p, k > 0, jnp.int32(0), jnp.ones_like, k.astype(jnp.float32))
    (total,) = p.sums([low], lambda p: p)
    low = _highest(p, top_p < 1, low, lambda p: p, top_p * total)
    (total,) = p.sums([low], lambda p: p)
    token_ref[row] = _inverse_cdf(p, low, u_ref[row] * total)


def _highest(
    p: _Probabilities, wanted: Array, low: Array, what: Callable[[Array], Array], need: Array
) -> Array:
    """The highest threshold, from `low` on, at which the sum of `what` still reaches `need`.

    Thresholds are bits of floats, which order as positive floats do.

    Args:
        wanted: whether to search at all; if not, the result is `low`.
    """

    def narrow(bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds  # the sum at `low` is enough, that at `high` is not
        quarter = jnp.maximum(lax.shift_right_logical(high - low, 2), 1)
        middles = [low + quarter * n for n in (1, 2, 3)]
        for middle, found in zip(middles, p.sums(middles, what), strict=True):
            enough = (found >= need) & (middle < high)
            low = jnp.where(enough, middle, low)
            high = jnp.where(enough, high, jnp.minimum(high, middle))
            high = jnp.where(enough & (found == need), middle + 1, high)
        return low, high

    start = low, jnp.where(wanted, jnp.int32(_ABOVE_ONE), low + 1)
    return lax.while_loop(lambda bounds: bounds[1] - bounds[0] > 1, narrow, start)[0]


def _inverse_cdf(p: _Probabilities, low: Array, target: Array) -> Array:
    """The token at which the running sum of probabilities that reach `low` passes the target.

    Rounding cannot make it a token of no weight.
    """
    place, width = p.scores.place, p.scores.width

    def choose(i: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        """The last part that has any weight and before which the sum is at most the target."""
        running, chosen, before = state
        weight = jnp.sum(p.kept(i, low))
        hit = (weight > 0) & (running <= target)
        return running + weight, jnp.where(hit, i, chosen), jnp.where(hit, running, before)

    zero = jnp.float32(0)
    start = zero, jnp.int32(0), zero
    _, chosen, before = lax.fori_loop(0, p.scores.num_parts, choose, start)
    inside = p.kept(chosen, low)

    def halve(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        first, end = bounds  # the sum of what lies before `first` is at most the target
        middle = lax.shift_right_logical(first + end, 1)
        fits = before + jnp.sum(jnp.where(place < middle, inside, 0.0)) <= target
        return jnp.where(fits, middle, first), jnp.where(fits, end, middle)

    bounds = jnp.int32(0), jnp.int32(width)
    last, _ = lax.fori_loop(0, width.bit_length(), halve, bounds)
    # of the entries up to there, it is the last one that has any weight
    weighs = (inside > 0) & (place <= last)
    at = jnp.max(jnp.where(weighs, place.astype(jnp.float32), 0.0))
    return p.scores.begin(chosen) + at.astype(jnp.int32)
