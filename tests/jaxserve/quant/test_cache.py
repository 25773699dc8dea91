"""Scales of a cache: found on text, kept beside the weights, used where a cache has eight bits."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from jaxserve import LLM, SamplingParams
from jaxserve.checkpoint import cache_scales, hf
from jaxserve.errors import CheckpointError
from jaxserve.models.family import family
from jaxserve.quant import PLAIN, cache, quantize_checkpoint
from jaxserve.quant.leaves import Leaves
from jaxserve.testing import write_checkpoint
from kernels_pallas import cpu
from kernels_pallas.paged_attention.codec import StaticInt8Pages
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
