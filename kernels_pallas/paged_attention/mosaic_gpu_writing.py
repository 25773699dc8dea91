"""Writing a step's keys and values into their pages on Hopper, in place: TMA only, no arithmetic.

A block of threads is given some consecutive tokens of the step. One copy brings their rows to
shared memory, and each row leaves on its own for its slot, all heads of it at once. So nothing else
of a page is read or written, wherever a chunk begins or ends.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.op import UnsupportedError, tried
from kernels_pallas.paged_attention import mosaic_gpu_int4_writing, mosaic_gpu_int8_writing
from kernels_pallas.paged_attention.codec import Int4Pages, QuantizedPages, to_stored
from kernels_pallas.paged_attention.ragged import Ragged, owners

_SHARED = 96 * 1024  # bytes of shared memory: two blocks of threads to a core
_CORES = 132
_EDGE = 256  # entries along an axis of what TMA copies
_LINE = 128  # bytes: where in shared memory a copy may begin


@dataclass(frozen=True)
class GpuTile:
    """tokens: of a block of threads, 0 for as many as leave a block to every core."""

    tokens: int = tried(0, 1, 4, 16)


def page_write(
    k_pages: Any, v_pages: Any, k: Array, v: Array | None, layer: Array | int,
    batch: Ragged, *, tile: GpuTile | None = None, interpret: Any = False,
) -> tuple[Any, Any]:  # fmt: skip
    """`reference.page_write` as a Hopper kernel."""
    options: dict[str, Any] = {"interpret": interpret}
    if isinstance(k_pages, Int4Pages):
        return mosaic_gpu_int4_writing.page_write(k_pages, v_pages, k, v, layer, batch, **options)
    if isinstance(k_pages, QuantizedPages):
        return mosaic_gpu_int8_writing.page_write(k_pages, v_pages, k, v, layer, batch, **options)
    stacks = [k_pages] if v_pages is None else [k_pages, v_pages]
    T, Z = k.shape[0], k_pages.shape[3]
    tokens = _tokens((tile or GpuTile()).tokens, T, stacks)
    blocks = -(-T // tokens)
    padding = blocks * tokens - T
    given = [k] if v is None else [k, v]
    new = [to_stored(x, pages) for x, pages in zip(given, stacks, strict=True)]
    new = [jnp.pad(x, ((0, padding), (0, 0), (0, 0))) if padding else x for x in new]
    row, position = owners(batch, T)
    page = batch.tables[row, jnp.maximum(position, 0) // Z]
    # one number a token: a block of threads reads it at once, and a token without a slot has -1
    slots = jnp.where(position >= 0, page * Z + position % Z, -1)
    layer = jnp.asarray(layer, jnp.int32).reshape(1)
    slots = jnp.pad(slots, (0, padding), constant_values=-1)
    out = _launch(layer, slots, new, stacks, tokens=tokens, page=Z, interpret=interpret)
    return out[0], None if v_pages is None else out[1]


@partial(jax.jit, static_argnames=("tokens", "page", "interpret"))
def _launch(
    layer: Array, slots: Array, new: list[Array], stacks: list[Array], *, tokens: int, page: int,
    interpret: Any,
) -> list[Array]:  # fmt: skip
    """The stacks with their new rows. Refs of a memory space want a jit around them."""
    caches = [jax.new_ref(pages, memory_space=plgpu.GMEM) for pages in stacks]
    rows = [(tokens, x.shape[1], size) for x in new for _, size in _parts(x.shape[-1])]
    arrived = plgpu.Barrier(num_arrivals=len(rows))
    scratch = [*(plgpu.SMEM(shape, new[0].dtype) for shape in rows), arrived]
    body = partial(_kernel, tokens=tokens, page=page, stacks=len(stacks))
    # plgpu.kernel of jax 0.10 takes no refs where they are exported
    write: Any = pl.kernel(
        lambda *refs: pl.run_scoped(partial(body, *refs), *scratch),
        out_type=(),
        mesh=plgpu.Mesh(grid=(slots.shape[0] // tokens,), grid_names=("block",)),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret,
        name="page_write",
    )
    write(layer, slots, *new, *caches)
    return [jax.freeze(cache) for cache in caches]


def _tokens(wanted: int, T: int, stacks: list[Array]) -> int:
    """Tokens of a block of threads, or what speaks against it."""
    dtype, heads, lanes = stacks[0].dtype, stacks[0].shape[2], [x.shape[-1] for x in stacks]
    if dtype not in (jnp.bfloat16, jnp.float32, jnp.uint16):
        raise UnsupportedError(f"pages of {dtype}: keep them in bfloat16 or float32")
    line = _LINE // dtype.itemsize
    if any(heads * size % line for n in lanes for _, size in _parts(n)):
        raise UnsupportedError(
            f"K={heads} heads of {lanes} lanes: a token's must fill lines of {line}, from which a "
            f"copy may begin"
        )
    if heads > _EDGE:
        raise UnsupportedError(f"K={heads} heads of keys, and TMA takes up to {_EDGE}")
    most = _SHARED // (heads * sum(lanes) * dtype.itemsize)
    if most < max(1, wanted) or wanted > _EDGE:
        raise UnsupportedError(
            f"{max(1, wanted)} tokens with {heads} heads of {lanes} lanes do not fit into "
            f"{_SHARED} bytes of shared memory: {min(most, _EDGE)} would"
        )
    return wanted or max(1, min(most, _EDGE, 1 << max(0, (T // _CORES).bit_length() - 1)))


def _parts(lanes: int) -> list[tuple[int, int]]:
    """The first of the lanes that a copy takes, and how many it takes."""
    return [(begin, min(_EDGE, lanes - begin)) for begin in range(0, lanes, _EDGE)]


def _kernel(layer, slots, *refs: Any, tokens: int, page: int, stacks: int) -> None:
    new, caches, (*rows, arrived) = refs[:stacks], refs[stacks : 2 * stacks], refs[2 * stacks :]
    first = lax.axis_index("block") * tokens
    parts = [(i, pl.ds(*part)) for i, x in enumerate(new) for part in _parts(x.shape[-1])]
    for (i, part), row in zip(parts, rows, strict=True):
        plgpu.copy_gmem_to_smem(new[i].at[pl.ds(first, tokens), :, part], row, arrived)
    plgpu.barrier_wait(arrived)

    @pl.loop(0, tokens)
    def _(t: Array) -> None:
        slot = slots[first + t]

        @pl.when(slot >= 0)
        def _() -> None:
            number, z = lax.div(slot, jnp.int32(page)), lax.rem(slot, jnp.int32(page))
            for (i, part), row in zip(parts, rows, strict=True):
                plgpu.copy_smem_to_gmem(row.at[t], caches[i].at[layer[0], number, :, z, part])

    plgpu.wait_smem_to_gmem(0)
