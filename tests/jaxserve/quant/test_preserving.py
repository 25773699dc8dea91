"""Folds and rotations change no output, in any family that takes them."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.checkpoint import hf
from jaxserve.models.attention import packed
from jaxserve.models.family import family
from jaxserve.models.ops import Ops
from jaxserve.quant import rotate, scale_search
from jaxserve.quant.leaves import Leaves, readers
from jaxserve.quant.record import record
from jaxserve.testing import FAMILIES, write_checkpoint
from tests.sparing import sparing

WRITABLE = [f for f in FAMILIES if f != "gpt_oss"]
TURNABLE = [f for f in WRITABLE if f != "gemma3_text"]
DOCUMENTS = [np.random.default_rng(i).integers(3, 90, 24).tolist() for i in range(6)]


def read(folder: Path, dtype: str = "float32") -> Leaves:
    """A checkpoint's weights in float32, of which `dtype` will be stored."""
    raw = hf.read_config(folder)
    module = family(raw["model_type"])
    cfg = hf.model_config(module, raw)
    options = {"unrolled": True, "place": lambda _, x: x, "progress": False}
    params = hf.load_params(folder, module, cfg, "float32", **options)
    return Leaves.of(module, cfg, params, dtype)


def tiny(folder: Path, model_type: str, **overrides) -> Leaves:
    write_checkpoint(folder, model_type, tokenizer=False, **overrides)
    return read(folder)


def logits(leaves: Leaves, documents=DOCUMENTS) -> np.ndarray:
    """Of every token of documents of one length."""
    tokens = jnp.asarray(documents)
    at = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)

    @jax.jit
    def run(params):
        ops = Ops(attend=packed(jnp.ones_like(tokens), at), dtype=jnp.float32)
        hidden, _ = leaves.family.forward(leaves.cfg, params, tokens, at, ops, None)
        return leaves.family.logits(leaves.cfg, params, hidden, ops)

    return np.asarray(run(jax.tree.map(jnp.asarray, leaves.tree())))


def same(found: np.ndarray, want: np.ndarray) -> None:
    assert np.abs(found - want).max() < 1e-4 * np.abs(want).max()


@pytest.mark.parametrize("model_type", sparing(TURNABLE, "qwen3_moe", "deepseek_v3"))
def test_rotations_change_no_output(model_type, tmp_path):
    leaves = tiny(tmp_path, model_type)
    want, before = logits(leaves), leaves.layers[0]["attn.wo"].copy()
    assert rotate.refusal(leaves) is None
    rotate.rotate(leaves)
    assert np.abs(leaves.layers[0]["attn.wo"] - before).max() > 0.01
    same(logits(leaves), want)


@pytest.mark.parametrize("model_type", sparing(WRITABLE, "qwen2"))
def test_folded_scales_change_no_output(model_type, tmp_path, monkeypatch):
    rng = np.random.default_rng(0)

    def any_scale(products, spread=lambda x: x, per_channel=True):
        channels = products[0].matrix.shape[1]
        return spread(2.0 ** rng.integers(-4, 5, channels)).astype(np.float32)

    monkeypatch.setattr(scale_search, "best_scale", any_scale)
    leaves = tiny(tmp_path, model_type)
    want = logits(leaves)
    names = set(leaves.layers[-1])
    before = {name: leaves.layers[-1][name].copy() for name in names}
    inputs = record(leaves, DOCUMENTS, rows=64, seed=0)
    for i in range(len(leaves.layers)):
        scale_search.search(leaves, inputs, i)
    kept = {n for n in names if np.array_equal(before[n], leaves.layers[-1][n])}
    moving = ("attn_norm", "mlp_norm", "w_down", "w_up", "wo", "wv", "w_uv", "router", "wq_b")
    assert not {n for n in kept if n.endswith(moving)}
    if model_type == "gemma3_text":  # its norms store their distance from one
        same(logits(leaves), want)
    else:
        np.testing.assert_array_equal(logits(leaves), want, "powers of two are exact")


def test_norms_that_store_their_distance_from_one_are_stored_as_they_were_folded(
    tmp_path, monkeypatch
):
    """In bfloat16, where a norm that lets little through lies between steps of 2^-8."""
    write_checkpoint(tmp_path, "gemma3_text", tokenizer=False, dtype="bfloat16")
    leaves = read(tmp_path, "bfloat16")
    for layer in leaves.layers:
        layer["attn_norm"][5] = -1.0  # shuts a channel
        layer["mlp_norm"][[6, 7]] = [-1.5, -0.25]
    want, rng = logits(leaves), np.random.default_rng(0)

    def any_scale(products, spread=lambda x: x, per_channel=True):
        channels = products[0].matrix.shape[1]
        return spread(2.0 ** rng.integers(-4, 12, channels)).astype(np.float32)

    monkeypatch.setattr(scale_search, "best_scale", any_scale)
    inputs = record(leaves, DOCUMENTS, rows=64, seed=0)
    for i, layer in enumerate(leaves.layers):
        before = layer["attn_norm"].copy()
        scale_search.search(leaves, inputs, i)
        assert not np.array_equal(layer["attn_norm"], before)
        for name in ("attn_norm", "mlp_norm"):
            np.testing.assert_array_equal(layer[name].astype(leaves.dtype), layer[name])
        assert layer["attn_norm"][5] == -1.0
    same(logits(leaves), want)


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3_moe", "deepseek_v3"])
def test_both_together_and_inputs_stay_what_products_are_given(model_type, tmp_path):
    leaves = tiny(tmp_path, model_type)
    want = logits(leaves)
    rotate.rotate(leaves)
    inputs = record(leaves, DOCUMENTS, rows=40, seed=0)
    for i in range(len(leaves.layers)):
        scale_search.search(leaves, inputs, i)
    same(logits(leaves), want)
    again = record(leaves, DOCUMENTS, rows=40, seed=0)
    for name in ("attn.wo", "attn.wkv_a" if model_type == "deepseek_v3" else "attn.wq"):
        found, fresh = inputs.rows(1, name), again.rows(1, name)
        np.testing.assert_allclose(found, fresh, atol=2e-3 * np.abs(fresh).max())


def test_a_rotation_is_orthogonal_and_spreads_one_channel_over_all():
    for size in (24, 32, 96, 7):
        q = rotate.rotation(size, np.random.default_rng(0))
        np.testing.assert_allclose(q @ q.T, np.eye(size), atol=1e-12)
        assert np.abs(q).max() < 1
    assert np.abs(rotate.rotation(64, np.random.default_rng(0))).max() == pytest.approx(1 / 8)


def test_a_model_that_cannot_be_turned_says_why(tmp_path):
    why = rotate.refusal(tiny(tmp_path, "gemma3_text"))
    assert why is not None and "attn_out_norm scales channels" in why


def test_a_tied_head_gets_weights_of_its_own(tmp_path):
    leaves = tiny(tmp_path, "qwen3", tie_word_embeddings=True)
    want = logits(leaves)
    assert "lm_head" not in leaves.outer
    rotate.rotate(leaves)
    assert not leaves.cfg.tied and "lm_head" in leaves.outer
    same(logits(leaves), want)


def test_who_reads_a_norm(tmp_path):
    specs = tiny(tmp_path, "deepseek_v3").specs()[-1]
    assert readers("attn_norm", specs) == ["attn.wq_a", "attn.wkv_a"]
    assert readers("mlp_norm", specs) == [
        "mlp.router", "mlp.experts.w_gate", "mlp.experts.w_up",
        "mlp.shared.w_gate", "mlp.shared.w_up",
    ]  # fmt: skip
