"""Writing a step's keys and values into their pages on Hopper, in place: TMA only, no arithmetic.

A block of threads is given some consecutive tokens of the step. One copy for each cache brings
their rows to shared memory, and each row is copied to its slot on its own, all heads of it at once.
So nothing else of a page is read or written, wherever a chunk begins or ends.
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

from kernels_pallas.hopper import CORES, LINE_BYTES
from kernels_pallas.op import UnsupportedError, tried
from kernels_pallas.paged_attention import mosaic_gpu_int4_writing, mosaic_gpu_int8_writing
from kernels_pallas.paged_attention.codec import Int4Pages, QuantizedPages, check_alike, to_stored
from kernels_pallas.paged_attention.ragged import Ragged, slots

_SHARED_BYTES = 96 * 1024  # of shared memory: two blocks of threads to a core
_TMA_ENTRIES = 256  # along an axis of what TMA copies, at most


@dataclass(frozen=True)
class GpuTile:
    """Sizes that may be tuned; pages of int8 and int4 have none.

    Attributes:
        tokens: of a block of threads, 0 for as many as leave a block to every core.
    """

    tokens: int = tried(0, 1, 4, 16)


def page_write(
    k_pages: Any, v_pages: Any, k: Array, v: Array | None, layer: Array | int,
    batch: Ragged, *, tile: GpuTile | None = None, interpret: Any = False,
) -> tuple[Any, Any]:  # fmt: skip
    """`reference.page_write` as a Hopper kernel.

    Raises:
        UnsupportedError: keys and values in pages of two kinds, or of another type than bfloat16,
            float32, int8 or int4; rows of a token that are no multiple of 128 bytes, all heads
            together; more than 256 heads; tokens whose rows do not fit into shared memory. Of int8
            and int4 pages, see `mosaic_gpu_int8_writing.page_write` and
            `mosaic_gpu_int4_writing.page_write`.
    """
    stacks = [k_pages] if v_pages is None else [k_pages, v_pages]
    check_alike(*stacks)
    options: dict[str, Any] = {"interpret": interpret}
    if isinstance(k_pages, Int4Pages):
        return mosaic_gpu_int4_writing.page_write(k_pages, v_pages, k, v, layer, batch, **options)
    if isinstance(k_pages, QuantizedPages):
        return mosaic_gpu_int8_writing.page_write(k_pages, v_pages, k, v, layer, batch, **options)
    T, Z = k.shape[0], k_pages.shape[3]
    tokens = _tokens((tile or GpuTile()).tokens, T, stacks)
    blocks = -(-T // tokens)
    padding = blocks * tokens - T
    given = [k] if v is None else [k, v]
    new = [to_stored(x, pages) for x, pages in zip(given, stacks, strict=True)]
    new = [jnp.pad(x, ((0, padding), (0, 0), (0, 0))) if padding else x for x in new]
    slot = slots(batch, T, Z)
    layer = jnp.asarray(layer, jnp.int32).reshape(1)
    slot = jnp.pad(slot, (0, padding), constant_values=-1)
    out = _launch(layer, slot, new, stacks, tokens=tokens, page=Z, interpret=interpret)
    return out[0], None if v_pages is None else out[1]


@partial(jax.jit, static_argnames=("tokens", "page", "interpret"))
def _launch(
    layer: Array, slot: Array, new: list[Array], stacks: list[Array], *, tokens: int, page: int,
    interpret: Any,
) -> list[Array]:  # fmt: skip
    """The stacks with their new rows. Refs of a memory space want a jit around them.

    Args:
        slot: `ragged.slots` of whole blocks of tokens [blocks * tokens].
        new: rows [blocks * tokens, K, W] of each cache.
    """
    caches = [jax.new_ref(pages, memory_space=plgpu.GMEM) for pages in stacks]
    rows = [(tokens, x.shape[1], size) for x in new for _, size in _slices(x.shape[-1])]
    arrived = plgpu.Barrier(num_arrivals=len(rows))
    scratch = [*(plgpu.SMEM(shape, new[0].dtype) for shape in rows), arrived]
    body = partial(_kernel, tokens=tokens, page=page, stacks=len(stacks))
    # plgpu.kernel of jax 0.10 takes no refs where they are exported
    write: Any = pl.kernel(
        lambda *refs: pl.run_scoped(partial(body, *refs), *scratch),
        out_type=(),
        mesh=plgpu.Mesh(grid=(slot.shape[0] // tokens,), grid_names=("block",)),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret,
        name="page_write",
    )
    write(layer, slot, *new, *caches)
    return [jax.freeze(cache) for cache in caches]


def _tokens(wanted: int, T: int, stacks: list[Array]) -> int:
    """Tokens of a block of threads.

    Raises:
        UnsupportedError: see `page_write`.
    """
    dtype, heads, lanes = stacks[0].dtype, stacks[0].shape[2], [x.shape[-1] for x in stacks]
    if dtype not in (jnp.bfloat16, jnp.float32, jnp.uint16):
        raise UnsupportedError(f"pages of {dtype}: keep them in bfloat16 or float32")
    line = LINE_BYTES // dtype.itemsize
    if any(heads * size % line for n in lanes for _, size in _slices(n)):
        raise UnsupportedError(
            f"K={heads} heads of {lanes} lanes: a token's must fill lines of {line}, from which a "
            f"copy may begin"
        )
    if heads > _TMA_ENTRIES:
        raise UnsupportedError(f"K={heads} heads of keys, and TMA takes up to {_TMA_ENTRIES}")
    most = _SHARED_BYTES // (heads * sum(lanes) * dtype.itemsize)
    if most < max(1, wanted) or wanted > _TMA_ENTRIES:
        raise UnsupportedError(
            f"{max(1, wanted)} tokens with {heads} heads of {lanes} lanes do not fit into "
            f"{_SHARED_BYTES} bytes of shared memory: {min(most, _TMA_ENTRIES)} would"
        )
    per_core = 1 << max(0, (T // CORES).bit_length() - 1)
    return wanted or max(1, min(most, _TMA_ENTRIES, per_core))


def _slices(lanes: int) -> list[tuple[int, int]]:
    """Lanes as copies take them: the first lane, and how many."""
    begins = range(0, lanes, _TMA_ENTRIES)
    return [(begin, min(_TMA_ENTRIES, lanes - begin)) for begin in begins]


def _kernel(layer: Any, slots: Any, *refs: Any, tokens: int, page: int, stacks: int) -> None:
    """Writes the rows of some consecutive tokens.

    Args:
        layer: int32 [1].
        slots: int32 [blocks * tokens]; -1 where nothing is written.
        refs: for each cache rows [blocks * tokens, K, W]; then its pages [L, P, K, Z, W]; then
            shared memory [tokens, K, lanes] for each slice of the lanes of each cache; a barrier.
        page: slots of a page.
        stacks: how many caches there are.
    """
    new, caches, (*rows, ready) = refs[:stacks], refs[stacks : 2 * stacks], refs[2 * stacks :]
    first = lax.axis_index("block") * tokens
    slices = [(i, pl.ds(*lanes)) for i, x in enumerate(new) for lanes in _slices(x.shape[-1])]
    for (i, lanes), row in zip(slices, rows, strict=True):
        plgpu.copy_gmem_to_smem(new[i].at[pl.ds(first, tokens), :, lanes], row, ready)
    plgpu.barrier_wait(ready)

    @pl.loop(0, tokens)
    def _(t: Array) -> None:
        slot = slots[first + t]

        @pl.when(slot >= 0)
        def _() -> None:
            number, z = lax.div(slot, jnp.int32(page)), lax.rem(slot, jnp.int32(page))
            for (i, lanes), row in zip(slices, rows, strict=True):
                plgpu.copy_smem_to_gmem(row.at[t], caches[i].at[layer[0], number, :, z, lanes])

    plgpu.wait_smem_to_gmem(0)
