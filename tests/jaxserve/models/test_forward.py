"""What needs no transformers: types that a pass keeps, and pages that change nothing."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.cache.attend import paged
from jaxserve.cache.kv_cache import KVCache
from jaxserve.checkpoint.hf import model_config
from jaxserve.models.attention import packed
from jaxserve.models.family import family
from jaxserve.models.ops import Ops
from jaxserve.testing import FAMILIES, MXFP4, family_config, write_checkpoint
from kernels_pallas.paged_attention import Ragged
from sharding.tree import abstract
from tests.jaxserve.models import parity


@pytest.mark.parametrize("stored", [jnp.bfloat16, jnp.uint16])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_bfloat16_step_keeps_its_types_and_its_cache(model_type, stored):
    """Under strict promotion, so that no float32 constant widens a residual stream."""
    f = family(model_type)
    cfg = model_config(f, family_config(model_type))
    params = abstract(f.declare_params(cfg), cfg.sizes, jnp.bfloat16)
    heads, key, value = cfg.kv_shape
    pages = [
        jax.ShapeDtypeStruct((cfg.num_layers, 6, heads, 8, lanes), stored) if lanes else None
        for lanes in (key, value)
    ]
    batch = Ragged(*(jax.ShapeDtypeStruct(s, jnp.int32) for s in ((4,), (3,), (3, 2), ())))
    row = jax.ShapeDtypeStruct((1, 16), jnp.int32)

    def step(params, kv, tokens, positions, batch):
        ops = Ops(attend=paged(batch), dtype=jnp.bfloat16)
        x, kv = f.forward(cfg, params, tokens, positions, ops, kv)
        return x, f.logits(cfg, params, x, ops), kv

    with jax.numpy_dtype_promotion("strict"):
        x, logits, kv = jax.eval_shape(step, params, KVCache(*pages), row, row, batch)
    assert (x.shape, x.dtype) == ((1, 16, cfg.embed), jnp.bfloat16)
    assert logits.shape == (1, 16, cfg.vocab)
    assert kv == KVCache(*pages)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_training_pass_needs_no_cache(model_type):
    f = family(model_type)
    cfg = model_config(f, family_config(model_type))
    params = abstract(f.declare_params(cfg), cfg.sizes, jnp.bfloat16)
    row = jax.ShapeDtypeStruct((2, 16), jnp.int32)

    def run(params, tokens, segments, positions):
        ops = Ops(attend=packed(segments, positions), dtype=jnp.bfloat16)
        return f.forward(cfg, params, tokens, positions, ops)

    with jax.numpy_dtype_promotion("strict"):
        x, kv = jax.eval_shape(run, params, row, row, row)
    assert (x.shape, x.dtype) == ((2, 16, cfg.embed), jnp.bfloat16)
    assert kv is None


@pytest.mark.skipif(
    importlib.util.find_spec("torch") is not None, reason="test_parity.py says more"
)
@pytest.mark.parametrize(
    ("model_type", "settings"),
    [*((name, {}) for name in FAMILIES), ("gpt_oss", {"quantization_config": MXFP4})],
)
def test_pages_and_chunks_change_nothing(tmp_path, model_type, settings):
    folder = write_checkpoint(tmp_path, model_type, tokenizer=False, **settings)
    f, cfg, params = parity.load(folder)
    tokens = np.random.default_rng(0).integers(5, cfg.vocab, (2, 40)).astype(np.int32)
    whole = parity.run_packed(f, cfg, params, tokens)
    assert np.isfinite(whole).all()
    assert whole.std() > 1
    np.testing.assert_allclose(parity.run_paged(f, cfg, params, list(tokens)), whole, atol=1e-3)
