"""The experts' gated MLPs, each over just the tokens that chose it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax

from kernels_pallas.linear import GATES
from kernels_pallas.linear import product as matrix_product
from kernels_pallas.quantize import Int8Rows
from kernels_pallas.weight import Int8Weight, StackedWeight, Weight, as_array, expert_of, unstacked
from sharding.tree import pytree, weight

BLOCK_ROWS = 16
"""Rows of one product. `lax.ragged_dot` is dense off TPU: it does E times the work."""


@pytree
class Experts:
    """Weights of E gated MLPs; biases in gpt-oss only."""

    w_gate: Weight = weight("experts expert_mlp embed", "{expert}.gate_proj.weight")
    w_up: Weight = weight("experts expert_mlp embed", "{expert}.up_proj.weight")
    w_down: Weight = weight("experts embed expert_mlp", "{expert}.down_proj.weight")
    b_gate: Weight | None = None
    b_up: Weight | None = None
    b_down: Weight | None = None


def experts(x: Array, ids: Array, weights: Array, p: Experts, *, activation: str) -> Array:
    """Sum over a token's experts of weight * down(gate(x) * up(x)).

    Tokens are sorted by expert and cut into blocks of `BLOCK_ROWS` rows of one expert, so work
    grows with the tokens and not with the number of experts.

    Args:
        x: [T, D].
        ids, weights: [T, A]; an id outside [0, E) contributes nothing.
        activation: a key of `kernels_pallas.linear.GATES`.

    Returns:
        [T, D] in x's type, accumulated in float32.
    """
    T, A = ids.shape
    E = p.w_gate.shape[0]
    row, expert_of_block = _blocks(ids.reshape(-1), E)  # [num_blocks, BLOCK_ROWS], [num_blocks]

    def block(_, inputs):
        rows, e = inputs
        one = jax.tree.map(lambda w: expert_of(w, e), p, is_leaf=_is_weight)
        h = x.at[rows // A].get(mode="fill", fill_value=0)
        return None, _mlp(h, one, activation)

    y = lax.scan(block, None, (row, expert_of_block))[1]  # [num_blocks, BLOCK_ROWS, D]
    flat = jnp.zeros((T * A, x.shape[1]), jnp.float32).at[row].set(y, mode="drop")
    return (flat.reshape(T, A, -1) * weights[..., None]).sum(1).astype(x.dtype)


def experts_on_rows(x: Array | Int8Rows, sizes: Array, p: Experts, *, activation: str) -> Array:
    """down(gate(x) * up(x)) for rows that are sorted by expert.

    Rows that were rounded to eight bits meet weights of eight bits as they are.

    Args:
        x: [R, D].
        sizes: [E] int32, rows of each expert.

    Returns:
        [R, D] in floats. Rows past the sum of sizes cost nothing, and are undefined.
    """
    R, D = x.shape
    row, expert_of_block = _cut(sizes, R)

    def block(y: Array, inputs: tuple[Array, Array]) -> tuple[Array, None]:
        rows, e = inputs

        def answered(y: Array) -> Array:
            one = jax.tree.map(lambda w: expert_of(w, e), p, is_leaf=_is_weight)
            h = jax.tree.map(lambda a: a.at[rows].get(mode="fill", fill_value=0), x)
            return y.at[rows].set(_mlp(h, one, activation), mode="drop")

        return lax.cond(rows[0] < R, answered, lambda y: y, y), None

    return lax.scan(block, jnp.zeros((R, D), jnp.float32), (row, expert_of_block))[0]


def dense_experts(x: Array, ids: Array, weights: Array, p: Experts, *, activation: str) -> Array:
    """The same sum, with every expert over every token: E / A times the work in three products.

    For a few small experts that beats sorting, above all in the backward pass. Arguments as
    `experts`, whose tokens it equals.
    """
    w_gate, w_up, w_down = (as_array(w) for w in (p.w_gate, p.w_up, p.w_down))
    share = jnp.zeros((x.shape[0], w_gate.shape[0]), jnp.float32)
    share = share.at[jnp.arange(x.shape[0])[:, None], ids].add(weights, mode="drop")

    def product(spec: str, a: Array, w: Array, b: Weight | None) -> Array:
        y = jnp.einsum(spec, a.astype(w.dtype), w, preferred_element_type=jnp.float32)
        return y if b is None else y + as_array(b).astype(jnp.float32)

    gate = product("td,efd->tef", x, w_gate, p.b_gate)
    hidden = GATES[activation](gate, product("td,efd->tef", x, w_up, p.b_up)) * share[..., None]
    y = jnp.einsum(
        "tef,edf->td", hidden.astype(w_down.dtype), w_down, preferred_element_type=jnp.float32
    )
    if p.b_down is not None:
        y = y + share @ as_array(p.b_down).astype(jnp.float32)
    return y.astype(x.dtype)


def _is_weight(w: object) -> bool:
    return isinstance(w, StackedWeight | Int8Weight)


def _blocks(ids: Array, num_experts: int) -> tuple[Array, Array]:
    """Rows of `ids` (flattened tokens x choices) by block, and each block's expert.

    Slots past an expert's last row hold len(ids), which gathers as zeros and scatters nowhere.
    """
    n = ids.shape[0]
    ids = jnp.where((ids >= 0) & (ids < num_experts), ids, num_experts)
    order = jnp.argsort(ids, stable=True)
    row, expert = _cut(jnp.bincount(ids, length=num_experts + 1)[:num_experts], n)
    return order.at[row].get(mode="fill", fill_value=n), expert


def _cut(sizes: Array, num_rows: int) -> tuple[Array, Array]:
    """Rows sorted by expert as blocks of `BLOCK_ROWS`, and each block's expert.

    Every expert's rows start at a fresh block; slots past its last row hold `num_rows`.

    Args:
        sizes: [E], rows of each expert.
    """
    num_experts = sizes.shape[0]
    blocks = -(-sizes // BLOCK_ROWS)
    first_block = jnp.cumsum(blocks) - blocks
    first_row = jnp.cumsum(sizes) - sizes
    num_blocks = -(-num_rows // BLOCK_ROWS) + min(num_experts, num_rows)
    b = jnp.arange(num_blocks)
    expert = jnp.clip(jnp.searchsorted(jnp.cumsum(blocks), b, side="right"), 0, num_experts - 1)
    within = (b - first_block[expert])[:, None] * BLOCK_ROWS + jnp.arange(BLOCK_ROWS)
    real = (within >= 0) & (within < sizes[expert][:, None])
    return jnp.where(real, first_row[expert][:, None] + within, num_rows), expert


def _mlp(h: Array | Int8Rows, p: Experts, activation: str) -> Array:  # [rows, D] float32
    def product(a: Array | Int8Rows, w: Weight, b: Weight | None) -> Array:
        y = matrix_product(a, unstacked(w))
        return y if b is None else y + as_array(b).astype(jnp.float32)

    hidden = GATES[activation](product(h, p.w_gate, p.b_gate), product(h, p.w_up, p.b_up))
    return product(hidden, p.w_down, p.b_down)
