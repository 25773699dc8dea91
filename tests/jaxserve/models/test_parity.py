"""Every family's logits and gradients are those of transformers."""

import copy
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.checkpoint import hf
from jaxserve.models.family import FAMILIES as SERVED
from jaxserve.models.family import family
from jaxserve.models.layers import restack
from tests.jaxserve.models import hf_cases, parity
from tests.jaxserve.models.hf_cases import CASES, FAMILIES

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("default")  # torch's and transformers' own

TOLERANCE = 1e-3  # of logits that spread over several units

QUICK = ("llama", "gemma3_text", "gpt_oss", "qwen3_moe", "deepseek_v3")


def params_of(plain, others=()):
    """Cases, of which only `plain` run without `-m slow`."""
    rest = [pytest.param(name, marks=pytest.mark.slow) for name in others if name not in plain]
    return [*plain, *rest]


def documents(lengths=(40, 23, 17), seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(2, hf_cases.VOCAB, n).astype(np.int32) for n in lengths]


def pack(docs):
    """One row of documents: tokens, segments and positions, each [1, T]."""
    segments = np.concatenate([np.full(len(d), i, np.int32) for i, d in enumerate(docs)])
    positions = np.concatenate([np.arange(len(d), dtype=np.int32) for d in docs])
    return [jnp.asarray(x)[None] for x in (np.concatenate(docs), segments, positions)]


def test_cases_cover_every_served_family():
    assert set(FAMILIES) == set(SERVED)


@pytest.mark.parametrize("name", params_of(QUICK, CASES))
def test_logits_are_transformers(name):
    docs = documents()
    expected = [hf_cases.logits(name, doc[None])[0] for doc in docs]
    assert np.concatenate(expected).std() > 1, "the reference says too little"
    f, cfg, params = parity.load(hf_cases.checkpoint(name))
    run = parity.jit(lambda p, *row: parity.packed_logits(f, cfg, p, *row))
    rows = np.asarray(run(params, *pack(docs)))[0]
    np.testing.assert_allclose(rows, np.concatenate(expected), atol=TOLERANCE)
    served = parity.run_paged(f, cfg, params, docs)
    np.testing.assert_allclose(np.concatenate(served), np.concatenate(expected), atol=TOLERANCE)


@pytest.mark.parametrize("name", [n for n in CASES if "quantization_config" not in CASES[n]])
def test_both_spellings_of_a_config_are_one_model(name):
    """The hub's config.json, and the one that transformers writes after reading it."""
    folder = hf_cases.checkpoint(name)
    theirs = json.loads((folder / "config.transformers.json").read_text())
    f = family(theirs["model_type"])
    assert hf.model_config(f, hf.read_config(folder)) == hf.model_config(f, theirs)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("deepseek_v3", (1, 1, 1)),
        pytest.param("llama", (2, 1), marks=pytest.mark.slow),
        pytest.param("qwen3_moe", (1, 1, 1), marks=pytest.mark.slow),
    ],
)
def test_scanned_layers_equal_unrolled_layers(name, sizes):
    docs = documents()
    f, cfg, params = parity.load(hf_cases.checkpoint(name))
    other = restack(params, sizes)
    assert tuple(len(jax.tree.leaves(s)[0]) for s in other.stacks) == sizes
    run = parity.jit(lambda p, *row: parity.packed_logits(f, cfg, p, *row))
    np.testing.assert_allclose(run(other, *pack(docs)), run(params, *pack(docs)), atol=1e-4)
    served = zip(
        parity.run_paged(f, cfg, other, docs), parity.run_paged(f, cfg, params, docs), strict=True
    )
    for a, b in served:
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_restack_refuses_what_cannot_be_one_stack():
    _, _, params = parity.load(hf_cases.checkpoint("qwen3_moe"))
    with pytest.raises(ValueError, match="layers 0 to 1 differ"):
        restack(params, (2, 1))
    with pytest.raises(ValueError, match="add up to 3 layers"):
        restack(params, (1, 1))


def torch_gradients(name, docs, folder):
    """The gradient of the mean next-token loss, as a checkpoint that we can load."""
    import torch

    model = copy.deepcopy(hf_cases.reference(name))
    losses = []
    for doc in docs:
        tokens = torch.from_numpy(doc.astype(np.int64))
        logits = model(tokens[None]).logits[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="sum"))
    (sum(losses) / sum(len(doc) - 1 for doc in docs)).backward()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.zeros_like(weight) if weight.grad is None else weight.grad)
    model.save_pretrained(folder)
    (folder / "config.json").write_text((hf_cases.checkpoint(name) / "config.json").read_text())
    return parity.load(folder)[2]


@pytest.mark.parametrize(
    "name",
    params_of(
        ["qwen3", "mixtral"],
        [n for n in CASES if "quantization_config" not in CASES[n]],
    ),
)
def test_gradients_are_torchs(name, tmp_path):
    docs = documents((21, 12))
    expected = torch_gradients(name, docs, tmp_path)
    f, cfg, params = parity.load(hf_cases.checkpoint(name))
    tokens, segments, positions = pack(docs)

    def loss(params):
        logits = parity.packed_logits(f, cfg, params, tokens, segments, positions)[0, :-1]
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[0, 1:, None], -1)[:, 0]
        return -jnp.mean(chosen, where=segments[0, 1:] == segments[0, :-1])

    got = parity.jit(jax.grad(loss))(params)
    leaves = zip(jax.tree.leaves_with_path(got), jax.tree.leaves(expected), strict=True)
    for (path, ours), theirs in leaves:
        where = jax.tree_util.keystr(path)
        if "correction" in where:  # moved by a rule of its own, never by a gradient
            assert not np.any(ours)
            continue
        assert np.isfinite(ours).all(), where
        scale = np.abs(theirs).max()
        assert scale > 0, f"{where} is not reached at all"
        np.testing.assert_allclose(ours, theirs, atol=2e-3 * float(scale), err_msg=where)
