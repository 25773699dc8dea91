"""Scales of a cache: found on text, kept beside the weights, used where a cache has eight bits."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxserve import LLM, SamplingParams
from jaxserve.checkpoint import cache_scales, hf
from jaxserve.errors import CheckpointError
from jaxserve.models.attention import packed
from jaxserve.models.family import family
from jaxserve.models.ops import Ops
from jaxserve.quant import PLAIN, cache, quantize_checkpoint
from jaxserve.quant.leaves import Leaves
from jaxserve.testing import write_checkpoint
from kernels_pallas import cpu
from kernels_pallas.paged_attention.codec import StaticInt8Pages
from tests.jaxserve.quant.test_preserving import read, tiny
from tests.sparing import sparing

SCORED = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
PROMPTS = [list(range(5, 45)), [7, 9, 11]]
KERNELS = [
    pytest.param("reference", marks=pytest.mark.slow),
    pytest.param("native", marks=pytest.mark.skipif(not cpu.available(), reason="no C++ compiler")),
]


def documents(seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(5, 200, n).tolist() for n in (40, 23, 40, 7) * 4]


@pytest.fixture(scope="module", params=sparing(["qwen3", "deepseek_v3"], "qwen3"))
def folders(request, tmp_path_factory):
    """A checkpoint, and one in eight bits with scales of its cache."""
    place = tmp_path_factory.mktemp(request.param)
    folder = write_checkpoint(place / "floats", request.param, tokenizer=False)
    config = dataclasses.replace(PLAIN, kv_cache=True)
    out = quantize_checkpoint(
        folder, place / "eight", config, documents=documents(), progress=False
    )
    return folder, out


def serve(folder, **settings):
    small = {"max_model_len": 64, "max_num_seqs": 2, "max_num_batched_tokens": 64, "page_size": 8}
    return LLM(folder, tokenizer=False, progress=False, num_pages=24, **small, **settings)


def logprobs(llm) -> np.ndarray:
    """Of the prompts' own tokens, so that no choice between near ties leads elsewhere."""
    out = llm.generate([{"prompt_token_ids": p} for p in PROMPTS], SCORED)
    told = ((o.prompt_logprobs, p) for o, p in zip(out, PROMPTS, strict=True))
    return np.array([step[p[i]].logprob for steps, p in told for i, step in enumerate(steps) if i])


@pytest.mark.slow
@pytest.mark.parametrize("kernels", KERNELS)
def test_a_cache_uses_the_scales_of_its_checkpoint(folders, kernels):
    """And loses about as much as one that finds its own; more where a lane grows past all seen."""
    _, out = folders
    with serve(out, kernels=kernels) as llm:
        exact = logprobs(llm)
    with serve(out, kernels=kernels, kv_cache_dtype="int8") as llm:
        assert llm.plan.kv_calibrated and llm.plan.kv_taint == "int8 calibrated"
        pages = llm._runner.kv.k
        assert isinstance(pages, StaticInt8Pages)
        assert sum(leaf.nbytes for leaf in jax.tree.leaves(pages.values)) <= llm.plan.kv_bytes
        first = logprobs(llm)
        llm.sleep(level=1)
        llm.wake_up()
        np.testing.assert_allclose(logprobs(llm), first, rtol=1e-5)  # with the scales again
    (out / cache_scales.FILE).rename(out / "away")
    try:
        with serve(out, kernels=kernels, kv_cache_dtype="int8") as llm:
            own = logprobs(llm)
    finally:
        (out / "away").rename(out / cache_scales.FILE)
    assert 0 < np.abs(first - exact).mean() < 2 * np.abs(own - exact).mean()


def test_without_scales_a_cache_finds_its_own(folders):
    folder, _ = folders
    with serve(folder, kv_cache_dtype="int8") as llm:
        assert not llm.plan.kv_calibrated and llm.plan.kv_taint == "int8"


@pytest.mark.slow
def test_scales_are_the_largest_that_were_seen(tmp_path):
    """Of every layer, head and lane, against attention's arguments in a pass of one document."""
    folder = write_checkpoint(tmp_path, "qwen3", tokenizer=False)
    raw = hf.read_config(folder)
    module = family(raw["model_type"])
    cfg = hf.model_config(module, raw)
    params = hf.load_params(folder, module, cfg, "float32", unrolled=True, place=lambda _, x: x)
    scales = cache.calibrate_cache(Leaves.of(module, cfg, params), documents())
    each = [cache.calibrate_cache(Leaves.of(module, cfg, params), [d]) for d in documents()]
    heads, key, value = cfg.kv_shape
    assert {k: x.shape for k, x in scales.items()} == {
        "k": (cfg.num_layers, heads, key), "v": (cfg.num_layers, heads, value)
    }  # fmt: skip
    for kind, found in scales.items():
        np.testing.assert_allclose(found, np.max([e[kind] for e in each], 0), rtol=1e-5)


def keys_at(leaves: Leaves, tokens: np.ndarray, first: int) -> np.ndarray:
    """Keys [L, T, K, H] of a document whose first token stands at position `first`."""
    keys, at = [], first + jnp.arange(tokens.size)[None]
    attend = packed(jnp.ones_like(at), at)

    def watch(q, k, *rest, **options):
        keys.append(np.asarray(k[0]))
        return attend(q, k, *rest, **options)

    params = jax.tree.map(jnp.asarray, leaves.tree())
    ops = Ops(attend=watch, dtype=jnp.float32)
    leaves.family.forward(leaves.cfg, params, jnp.asarray(tokens)[None], at, ops, None)
    return np.stack(keys)


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("qwen2", {}),
        ("llama", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
        pytest.param("deepseek_v3", {}, marks=pytest.mark.slow),  # neighbours, behind the latent
        ("gemma3_text", {}),  # layers with a window turn at another speed
    ],
)
def test_scales_hold_at_positions_that_calibration_has_not_seen(model_type, settings, tmp_path):
    """A key turns on: what was in one lane of a pair comes into the other."""
    leaves = tiny(tmp_path, model_type, **settings)
    pairs, first = len(leaves.cfg.rope.inv_freq), sum(leaves.cfg.key_parts[:-1])
    slow = first + pairs - 1 if model_type != "deepseek_v3" else first + 2 * pairs - 2
    for layer in leaves.layers:  # a slow lane is far larger than the one that it turns with
        name = "attn.wkv_a" if "attn.wkv_a" in layer else "attn.wk"
        layer[name] = layer[name].copy()
        layer[name][..., slow, :] *= 40.0
    text = np.random.default_rng(0).integers(3, 90, 16)
    scales = cache.calibrate_cache(leaves, [text.tolist()])
    most = 127 * scales["k"][:, None]
    assert (np.abs(keys_at(leaves, text, 0)) <= most).all()
    turn = np.pi / 2 / min(leaves.cfg.rope.inv_freq)
    for position in (turn / 2, turn, 1.5 * turn):
        assert (np.abs(keys_at(leaves, text, int(position))) <= most).all()


@pytest.mark.slow
def test_a_calibrated_cache_is_good_at_long_contexts(tmp_path):
    """Qwen2's keys have large biases in lanes that turn slowly; calibration reads short texts."""
    folder = write_checkpoint(tmp_path / "floats", "qwen2", tokenizer=False)
    tensors = load_file(folder / "model.safetensors")
    for name, x in tensors.items():
        if name.endswith("k_proj.bias"):
            x.reshape(2, 16)[:, 6] += 8  # a whole turn takes 6283 tokens
        if name.endswith("q_proj.bias"):
            x.reshape(4, 16)[:, 6] += 0.5
    save_file(tensors, folder / "model.safetensors")
    leaves = read(folder)
    scales = cache.calibrate_cache(leaves, documents())
    prompt = np.random.default_rng(0).integers(5, 300, leaves.cfg.max_len - 8).tolist()

    def scored(**settings) -> np.ndarray:
        long = {"max_model_len": leaves.cfg.max_len, "num_pages": 64, "page_size": 64}
        with LLM(
            folder, tokenizer=False, progress=False, max_num_seqs=2, max_num_batched_tokens=256,
            **long, **settings,
        ) as llm:  # fmt: skip
            (out,) = llm.generate([{"prompt_token_ids": prompt}], SCORED)
        return np.array([s[prompt[i]].logprob for i, s in enumerate(out.prompt_logprobs) if i])

    exact, own = scored(), scored(kv_cache_dtype="int8")
    cache_scales.save(folder, scales)
    calibrated = scored(kv_cache_dtype="int8")
    late = slice(len(prompt) // 2, None)
    own, calibrated = (np.abs(x - exact)[late].mean() for x in (own, calibrated))
    assert 0 < calibrated < 2 * own


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no archive", "no zip archive"),
        (b"", "no zip archive"),
        ("text", "no numbers from 0"),
        ({"k": np.ones((1, 2, 3))}, "has scales .* expected"),
        ("nan", "no numbers from 0"),
    ],
)
def test_what_is_not_the_models_is_refused(tmp_path, content, message):
    folder = write_checkpoint(tmp_path, "qwen3", tokenizer=False)
    raw = hf.read_config(folder)
    cfg = hf.model_config(family(raw["model_type"]), raw)
    heads, key, value = cfg.kv_shape
    if isinstance(content, bytes):
        (folder / cache_scales.FILE).write_bytes(content)
    elif isinstance(content, str):
        shapes = {"k": (cfg.num_layers, heads, key), "v": (cfg.num_layers, heads, value)}
        value = "?" if content == "text" else np.nan
        np.savez(folder / cache_scales.FILE, **{k: np.full(s, value) for k, s in shapes.items()})
    else:
        cache_scales.save(folder, content)
    with pytest.raises(CheckpointError, match=message):
        serve(folder, kv_cache_dtype="int8")
