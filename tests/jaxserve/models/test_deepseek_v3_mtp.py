"""The layer for multi-token prediction: equal to the published formula, trained, and exported."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.checkpoint import hf
from jaxserve.models import deepseek_v3, deepseek_v3_mtp
from jaxserve.models.attention import packed
from jaxserve.models.ops import Ops
from jaxserve.train.data import Batch
from jaxserve.train.loop import train
from jaxserve.train.loss import second_targets
from tests.jaxserve.train import runs

CONFIG = {**runs.DEEPSEEK_V3, "num_nextn_predict_layers": 1}


UNTIED = pytest.param(False, marks=pytest.mark.slow)


@pytest.fixture(scope="module", params=[True, UNTIED], ids=["tied", "untied"])
def trained(request, tmp_path_factory):
    """A run with the layer: (run, its folder, the exported model)."""
    folder = tmp_path_factory.mktemp("mtp")
    run = runs.job(folder, {**CONFIG, "tie_word_embeddings": request.param})
    return run, folder, train(run, progress=False)


def ops(rows):
    return Ops(attend=packed(jnp.ones_like(rows[0]), rows[1]), dtype=jnp.float32)


@pytest.mark.slow
def test_it_learns_what_comes_after_the_next(trained):
    _, folder, _ = trained
    lines = runs.metrics(folder)
    assert lines[-1]["ahead"] < 0.95 * lines[0]["ahead"]


def test_predictions_equal_the_formula_in_torch(trained):
    """Report, equation 21: a block over the projection of both norms, then the shared head."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from safetensors.torch import load_file
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as theirs

    run, _, folder = trained
    params = hf.load_params(folder, deepseek_v3_mtp, run.cfg, "float32", progress=False)
    ids = run.source.document(7).tokens[:16]
    row, at = jnp.asarray([ids[:-1]]), jnp.arange(len(ids) - 1)[None]
    how = ops((row, at))
    hidden, _ = deepseek_v3_mtp.forward(run.cfg, params, row, at, how)
    following = jnp.asarray([ids[1:]])
    x, _ = deepseek_v3_mtp.predict(run.cfg, params, hidden, following, at, how)
    ours = np.asarray(deepseek_v3_mtp.logits(run.cfg, params, x, how))[0]

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tensors = load_file(folder / "model.safetensors")
    n = run.cfg.num_layers
    mine = {k.removeprefix(f"model.layers.{n}."): v for k, v in tensors.items() if f".{n}." in k}
    block = theirs.DeepseekV3DecoderLayer(model.config, n).eval()
    lacking, _ = block.load_state_dict(mine, strict=False)
    assert not [name for name in lacking if "experts" not in name]
    experts = block.mlp.experts
    with torch.no_grad():
        if hasattr(experts, "gate_up_proj"):  # one tensor for all experts
            for e in range(run.cfg.router.num_experts):
                gate, up, down = (
                    mine[f"mlp.experts.{e}.{w}_proj.weight"] for w in ("gate", "up", "down")
                )
                experts.gate_up_proj[e] = torch.cat([gate, up])
                experts.down_proj[e] = down

        def norm(x, name):
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * mine[name]

        embedded = mine["embed_tokens.weight"][torch.tensor([ids[1:]])]
        states = model.model(torch.tensor([ids[:-1]])).last_hidden_state
        both = torch.cat([norm(embedded, "enorm.weight"), norm(states, "hnorm.weight")], -1)
        where = torch.arange(len(ids) - 1)[None]
        x = both @ mine["eh_proj.weight"].T
        causal = torch.full((len(ids) - 1,) * 2, float("-inf")).triu(1)[None, None]
        turn = model.model.rotary_emb(x, where)
        x = block(x, attention_mask=causal, position_ids=where, position_embeddings=turn)
        x = norm(x[0] if isinstance(x, tuple) else x, "shared_head.norm.weight")
        want = (x @ mine["shared_head.head.weight"].T)[0].numpy()
    np.testing.assert_allclose(ours, want, atol=2e-4)


def test_the_served_model_leaves_the_layer_in_the_checkpoint(trained):
    run, _, folder = trained
    served = hf.load_params(folder, deepseek_v3, run.cfg, "float32", progress=False)
    whole = hf.load_params(folder, deepseek_v3_mtp, run.cfg, "float32", progress=False)
    for a, b in zip(jax.tree.leaves(served), jax.tree.leaves(whole.main), strict=True):
        np.testing.assert_array_equal(a, b)


def test_without_its_loss_the_layer_is_left_out(tmp_path):
    run = runs.job(tmp_path, CONFIG, ahead=0.0, steps=1)
    assert run.family is deepseek_v3
    assert run.hf["num_nextn_predict_layers"] == 0


def test_more_layers_are_refused(tmp_path):
    with pytest.raises(ValueError, match="num_nextn_predict_layers=2 cannot be trained"):
        runs.job(tmp_path, {**CONFIG, "num_nextn_predict_layers": 2})


def test_second_targets_stay_within_a_document():
    batch = Batch(
        tokens=np.array([[1, 2, 3, 4, 5, 6]]),
        targets=np.array([[2, 3, 0, 5, 6, 0]]),
        weights=np.array([[0.0, 1, 0, 1, 1, 0]], np.float32),
        segments=np.array([[1, 1, 1, 2, 2, 2]]),
        positions=np.array([[0, 1, 2, 0, 1, 2]]),
    )
    targets, weights = second_targets(batch)
    assert weights.tolist() == [[1, 0, 0, 1, 0, 0]]
    assert targets[0, 0] == 3
    assert targets[0, 3] == 6
