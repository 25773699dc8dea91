"""Reward heads: what they see, that they learn, and what they refuse."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.checkpoint.reward_head import load_reward_head, save_reward_head
from jaxserve.errors import CheckpointError
from jaxserve.models import qwen3_moe
from jaxserve.models.attention import packed
from jaxserve.models.ops import Ops
from jaxserve.models.reward_head import evidence, log_odds, new_reward_head
from jaxserve.train.reward import Judged, fit_reward_head, judged
from sharding.tree import initialise
from tests.jaxserve.train import runs

STEP = 9


@pytest.fixture
def model():
    cfg = qwen3_moe.config({**runs.QWEN3_MOE, "vocab_size": 16})
    return cfg, initialise(qwen3_moe.declare_params(cfg), cfg.sizes, "float32")


def test_labels_stand_where_steps_end(model):
    cfg, params = model
    texts = [[1, 2, STEP, 3, STEP], [4, STEP]]
    data = judged(qwen3_moe, cfg, params, texts, STEP, [(True, False), (False,)])
    assert data.judged.tolist() == [[0, 0, 1, 0, 1], [0, 1, 0, 0, 0]]
    assert data.labels.tolist() == [[0, 0, 1, 0, 0], [0, 0, 0, 0, 0]]
    row, at = jnp.asarray([texts[1]]), jnp.arange(2)[None]
    ops = Ops(attend=packed(jnp.ones_like(row), at), dtype=jnp.float32)
    alone, _ = qwen3_moe.forward(cfg, params, row, at, ops)
    np.testing.assert_allclose(data.hidden[1, :2], alone[0], atol=1e-5)


def synthetic(seed, n=400):
    """A chain goes wrong with its first token whose first lane is above 1."""
    rng = np.random.default_rng(seed)
    hidden = rng.standard_normal((n, 6, 8)).astype(np.float32)
    right = np.cumsum(hidden[..., 0] > 1, 1) == 0
    ends = np.zeros((n, 6), np.float32)
    ends[:, [2, 5]] = 1
    return Judged(hidden, right * ends, ends)


def test_a_head_learns_what_no_single_token_says():
    head, held_out = fit_reward_head(synthetic(0), steps=1500, width=32), synthetic(1)
    odds = np.asarray(log_odds(head, held_out.hidden))
    ends = held_out.judged > 0
    right = held_out.labels > 0
    assert ((odds > 0) == right)[ends].mean() > 0.9


def test_odds_are_a_running_sum():
    head, x = new_reward_head(8, 16, seed=3), jnp.asarray(synthetic(2, 3).hidden)
    whole = log_odds(head, x)
    np.testing.assert_allclose(whole[:, :4], log_odds(head, x[:, :4]), atol=1e-6)
    later = whole[:, 3] + evidence(head, x[:, 4:]).sum(-1)
    np.testing.assert_allclose(whole[:, -1], later, atol=1e-5)


def test_labels_of_one_kind_are_refused():
    data = synthetic(0)
    with pytest.raises(ValueError, match="both kinds; 0%"):
        fit_reward_head(data._replace(labels=np.zeros_like(data.labels)))


def test_a_file_comes_back_or_says_what_is_wrong(tmp_path):
    head, file = new_reward_head(8, 16, seed=3), tmp_path / "reward_head.safetensors"
    save_reward_head(file, head)
    again = load_reward_head(file, 8)
    np.testing.assert_array_equal(again.w_in, head.w_in)
    with pytest.raises(CheckpointError, match="of 8 lanes, but the model has 12"):
        load_reward_head(file, 12)
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(CheckpointError, match="holds no reward head"):
        load_reward_head(file, 8)
