"""Blocks in VMEM, cut into parts."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from kernels_pallas.tpu import divisor, in_parts


def test_divisor():
    assert divisor(14336, 4096, 128) == 3584
    assert divisor(7168, 4096, 128) == 3584
    assert divisor(384, 128, 128) == 128
    assert divisor(128, 4096, 128) == 128


@pytest.mark.parametrize("size", [(8, 64), (40, 384), (100, 256), (128, 512)])
@pytest.mark.parametrize("stretch", [None, (32, 128), (64, 256), (100, 512), (512, 512)])
@pytest.mark.parametrize("part", [(16, 128), (32, 512)])
def test_parts_cover_a_block_once(size, part, stretch):
    shapes = set()

    def kernel(x_ref, out_ref):
        out_ref[...] = x_ref[...]

        def count(rows, columns):
            shapes.add((rows.size, columns.size))
            out_ref[rows, columns] += 1

        in_parts(size, part, count, stretch)

    out = jnp.zeros(size, jnp.int32)
    found = pl.pallas_call(kernel, out_shape=out, interpret=True)(out)
    np.testing.assert_array_equal(found, np.ones(size))
    lanes = part[1] if size[1] % 128 == 0 else size[1]
    assert all(rows <= part[0] and columns <= lanes for rows, columns in shapes)
