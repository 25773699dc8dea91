"""The pool on the device: its size is what was promised, and a copied page is the same page."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.cache.kv_cache import KVCache, allocate, copy_pages, page_bytes, storage_dtype
from kernels_pallas.paged_attention.codec import Int8Pages, StaticInt8Pages


@pytest.mark.parametrize("shape", [(2, 16, 16), (1, 40, 0), (3, 8, 24)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.uint16])
def test_a_pool_takes_the_bytes_that_the_plan_counts(shape: tuple[int, int, int], dtype: type):
    kv = allocate(3, 5, 8, shape, dtype, jax.devices()[0])
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(kv)) == 5 * page_bytes(3, 8, shape, dtype)
    assert kv.page_size == 8
    assert (kv.v is None) == (shape[2] == 0)


@pytest.mark.parametrize("shape", [(2, 16, 16), (1, 576, 0)])
@pytest.mark.parametrize(("dtype", "bits", "parts"), [("int8", 8, 2), ("int4", 4, 5)])
def test_a_rounded_pool_has_scales_beside_its_values(shape: Any, dtype: str, bits: int, parts: int):
    latent = (512, 64) if not shape[2] else None
    arguments = 3, 8, shape, jnp.dtype(dtype)
    kv = allocate(3, 5, *arguments[1:], jax.devices()[0], latent)
    found = sum(leaf.nbytes for leaf in jax.tree.leaves(kv))
    scales = 4 * (parts if latent else 2)  # a part each, or one of a key and one of a value
    assert found == 5 * page_bytes(*arguments, latent)
    assert found == 5 * 3 * 8 * shape[0] * ((shape[1] + shape[2]) * bits // 8 + scales)
    assert kv.page_size == 8


def test_bfloat16_is_kept_as_integers_on_cpu_alone():
    assert storage_dtype(jnp.bfloat16, "cpu") == jnp.uint16
    assert storage_dtype(jnp.bfloat16, "tpu") == jnp.bfloat16
    assert storage_dtype(jnp.float32, "cpu") == jnp.float32


def test_copies_take_scales_along_and_leave_calibrations():
    values = jnp.arange(2 * 6 * 4 * 8, dtype=jnp.int8).reshape(2, 6, 1, 4, 8)
    scale = jnp.arange(2 * 6 * 4, dtype=jnp.float32).reshape(2, 6, 1, 4)
    kv = KVCache(Int8Pages(values, scale, (8,)), StaticInt8Pages(values, jnp.ones((2, 1, 8))))
    copied = jax.tree.leaves(copy_pages(kv, jnp.array([3]), jnp.array([0])))
    moved = values.at[:, 0].set(values[:, 3])
    wanted = moved, scale.at[:, 0].set(scale[:, 3]), moved, jnp.ones((2, 1, 8))
    jax.tree.map(np.testing.assert_array_equal, copied, list(wanted))


def test_copies_read_what_was_there_before_any_of_them():
    pages = np.random.default_rng(0).normal(size=(2, 6, 1, 4, 3)).astype(np.float32)
    kv = KVCache(jnp.asarray(pages), jnp.asarray(2 * pages))
    source, target = jnp.array([0, 1, 5, 5]), jnp.array([1, 2, 3, 6])  # 6 is past the pool
    copied = copy_pages(kv, source, target)
    want = pages.copy()
    want[:, [1, 2, 3]] = pages[:, [0, 1, 5]]
    np.testing.assert_array_equal(copied.k, want)
    np.testing.assert_array_equal(copied.v, 2 * want)
