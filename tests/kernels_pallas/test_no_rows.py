"""Ops of no rows: kernels refuse them, and references answer with none."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest

from kernels_pallas.grouped_matmul import grouped_matmul
from kernels_pallas.int8_matmul import int8_matmul
from kernels_pallas.op import UnsupportedError
from kernels_pallas.rms_norm_quantize import rms_norm_quantize
from kernels_pallas.sample import sample
from kernels_pallas.target import Target

TARGETS = {"mosaic_tpu": Target("tpu", "v6e"), "mosaic_gpu": Target("gpu", "h200")}
NONE, W, SIZES = (
    jnp.zeros((0, 128)),
    jnp.zeros((2, 128, 128), jnp.bfloat16),
    jnp.zeros(2, jnp.int32),
)
EIGHT_BITS = NONE.astype(jnp.int8), jnp.zeros(0), W[0].astype(jnp.int8), jnp.zeros(128)

CALLS = {
    "int8": (int8_matmul, EIGHT_BITS, {}),
    "grouped": (grouped_matmul, (NONE.astype(jnp.bfloat16), W, SIZES), {}),
    "norm": (rms_norm_quantize, (NONE, jnp.ones(128)), {"eps": 1e-6}),
    "sample": (sample, (NONE, *[jnp.zeros(0)] * 2, SIZES[:0], *[jnp.zeros(0)] * 2), {}),
}


@pytest.mark.parametrize("body", TARGETS)
@pytest.mark.parametrize("name", CALLS)
def test_no_rows_are_left_to_the_reference(name, body):
    op, args, options = CALLS[name]
    run = partial(op, *args, target=TARGETS[body], **options)
    assert all(x.shape[0] == 0 for x in jax.tree.leaves(run()))
    with pytest.raises(UnsupportedError, match="0 rows"):
        run(implementation=body)
