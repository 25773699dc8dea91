"""Kernels take keys and values in pages of one kind; the reference takes any two."""

from __future__ import annotations

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.op import UnsupportedError
from kernels_pallas.paged_attention.cases import batch as step_of
from kernels_pallas.paged_attention.codec import empty
from kernels_pallas.paged_attention.ops import page_attention, page_write
from kernels_pallas.target import Target

KINDS = jnp.int8, jnp.int4, jnp.bfloat16, jnp.float32
TARGETS = {"mosaic_tpu": Target("tpu", "v6e"), "mosaic_gpu": Target("gpu", "h200")}
K, Z, W = 2, 128, 128


def operands(key_kind, value_kind):
    step, P = step_of((1, 5), (40, 137), Z)
    pages = [empty(kind, (1, P, K, Z, W), whole=True) for kind in (key_kind, value_kind)]
    k, v = jnp.ones((2, 6, K, W))
    q = jnp.ones((6, 4, W), jnp.bfloat16)
    return *pages, k, v, q, jax.tree.map(jnp.asarray, step)


@pytest.mark.parametrize("body", TARGETS)
@pytest.mark.parametrize(
    ("key_kind", "value_kind"), [*itertools.permutations(KINDS, 2)], ids=lambda kind: kind.__name__
)
def test_pages_of_two_kinds_are_left_to_the_reference(key_kind, value_kind, body):
    *pages, k, v, q, step = operands(key_kind, value_kind)

    def write(*pages, **options):
        return page_write(*pages, k, v, 0, step, target=TARGETS[body], **options)

    def attend(*pages, **options):
        return page_attention(q, *pages, 0, step, scale=0.1, target=TARGETS[body], **options)

    for op in (write, attend):
        jax.eval_shape(op, *pages)
        with pytest.raises(UnsupportedError, match=r"keys and values in .* in one kind"):
            jax.eval_shape(partial(op, implementation=body), *pages)


def test_scales_and_caps_below_zero_are_left_to_the_reference():
    *pages, _, _, q, step = operands(jnp.bfloat16, jnp.bfloat16)
    for options in ({"scale": 0.0}, {"scale": -0.1}, {"scale": 0.1, "soft_cap": -3.0}):
        run = partial(page_attention.run, **options)
        for body in TARGETS:
            with pytest.raises(UnsupportedError, match="must have the largest logit"):
                jax.eval_shape(partial(run, body), q, *pages, 0, step)


def test_a_table_with_more_rows_than_tokens_is_written_on_a_tpu():
    *pages, k, v, _, step = operands(jnp.float32, jnp.float32)
    step = step._replace(
        tables=jnp.pad(step.tables, ((0, 6), (0, 0))),
        kv_lens=jnp.pad(step.kv_lens, (0, 6)),
        row_starts=jnp.pad(step.row_starts, (0, 6), mode="edge"),
    )
    found = page_write.run("mosaic_tpu", *pages, k, v, 0, step, interpret=True)
    for x, y in zip(found, page_write.reference(*pages, k, v, 0, step), strict=True):
        np.testing.assert_array_equal(x, y)
