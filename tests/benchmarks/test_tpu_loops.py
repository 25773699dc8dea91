"""Kernels of JAX are asked for what ours compute."""

import jax
import pytest

from benchmarks.compiled import shipped
from benchmarks.tpu_loops import rivals

CASES = {(op.name, case.name): case for op, _, case in shipped("v6e", [], [])}


@pytest.mark.parametrize(
    ("op", "case", "of", "count"),
    [
        ("flash_attention", "4k", "splash_attention", 3),
        ("flash_attention", "8k-window", "splash_attention", 3),
        ("flash_attention_gradient", "8k-narrow", "splash_attention", 3),
        ("page_attention", "decode-32k", "ragged_paged_attention", 3),
        ("page_attention", "mixed-2048", "ragged_paged_attention", 3),
    ],
)
def test_rivals_compute_what_a_case_asks_for(op: str, case: str, of: str, count: int):
    found = list(rivals(op, CASES[op, case]))
    assert [entrant.name for entrant in found] == [of] * count
    outs = jax.eval_shape(found[0].run, *found[0].inputs)
    q, k, v = found[0].inputs[:3]
    if op == "flash_attention_gradient":
        assert [x.shape for x in outs] == [q.shape, k.shape, v.shape]
    else:
        assert outs.shape == (q.shape[1:] if op == "flash_attention" else q.shape)


@pytest.mark.parametrize(
    ("op", "case"),
    [
        ("page_attention", "latent-decode-8k"),
        ("page_attention", "decode-32k-mass"),
        ("page_attention", "int8-decode-32k"),
        ("sample", "64x151936-top_k-top_p"),
    ],
)
def test_nobody_else_computes_the_others(op: str, case: str):
    assert not list(rivals(op, CASES[op, case]))
