"""`kv_cache_dtype`: how many more tokens fit, what they lose, and that all else is as before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from benchmarks.kv_cache import measure
from jaxserve import LLM, SamplingParams
from jaxserve.cache.kv_cache import page_bytes
from jaxserve.config import EngineConfig
from jaxserve.errors import ConfigError
from jaxserve.models.family import family
from jaxserve.plan import Plan, resolve
from jaxserve.testing import family_config, write_checkpoint
from tests.jaxserve.test_plan import GIB, Device
from tests.sparing import sparing

ROUNDED = ("int8", "int4")
SHIPPED = Path(__file__).parents[3] / "models"
GREEDY = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)


def planned(name: str, raw: dict[str, Any], **asked: Any) -> Plan:
    cfg = family(name).config(raw)
    config = EngineConfig(max_num_seqs=4096, dtype="bfloat16", **asked)
    return resolve(config, raw, cfg, lambda *_: 0, Device(limit=GIB))


HEADS = family_config("qwen3", head_dim=128, max_position_embeddings=4096)
LATENT = family_config(
    "deepseek_v3", kv_lora_rank=512, qk_rope_head_dim=64, max_position_embeddings=4096
)


@pytest.mark.parametrize(
    ("name", "raw", "cache", "factor"),
    [
        ("qwen3", HEADS, "int8", 256 / 132),  # two bytes a lane; a scale for 128 lanes
        ("qwen3", HEADS, "int4", 256 / 68),
        ("deepseek_v3", LATENT, "int8", 1280 / 648),  # two parts; 576 lanes are padded to 640
        ("deepseek_v3", LATENT, "int4", 1280 / 352),  # five, whose rows are padded to eight
    ],
)
def test_a_gibibyte_holds_so_many_more_tokens(name: str, raw: Any, cache: str, factor: float):
    exact, plan = planned(name, raw), planned(name, raw, kv_cache_dtype=cache)
    tokens = [p.num_pages * p.page_size for p in (exact, plan)]
    assert tokens[1] / tokens[0] == pytest.approx(factor, rel=1e-3)
    assert plan.page_size == 128  # scales of a page are whole registers
    assert plan.kv_dtype == jnp.dtype(cache) and f"cache in {cache}" in plan.describe()
    assert (exact.kv_taint, plan.kv_taint) == ("exact", cache)


def test_padding_of_scales_costs_a_latent_row_of_four_bits_twelve_bytes():
    """Of 352, on a TPU alone: three more scales beside the five of a row that has 320 bytes."""
    lanes, kind = (1, 640, 0), jnp.dtype("int4")
    sizes = [page_bytes(1, 128, lanes, kind, (512, 128), whole_scales=w) for w in (False, True)]
    assert sizes == [128 * (320 + 4 * 5), 128 * (320 + 4 * 8)]
    plans = (planned("deepseek_v3", LATENT, kv_cache_dtype=c) for c in ROUNDED)
    layers = family("deepseek_v3").config(LATENT).num_layers
    a_token = [p.kv_bytes // (p.num_pages * p.page_size) for p in plans]
    assert a_token == [layers * 648, layers * 352]


def test_other_types_are_refused():
    message = "kv_cache_dtype='fp8' must be one of auto, bfloat16, int8, int4; int8 is as small"
    with pytest.raises(ConfigError, match=message):
        EngineConfig(kv_cache_dtype="fp8")  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_cache_of_bfloat16_serves_weights_of_float32(tmp_path: Path):
    folder = write_checkpoint(tmp_path, "llama", tokenizer=False, dtype="float32")
    asked, found = SamplingParams(max_tokens=1, prompt_logprobs=0, temperature=0), []
    prompt = list(range(3, 43))
    for cache in ("auto", "bfloat16"):
        with LLM(folder, tokenizer=False, num_pages=8, progress=False, kv_cache_dtype=cache) as llm:
            (out,) = llm.generate([{"prompt_token_ids": prompt}], asked)
            assert ("cache in bfloat16" in llm.plan.describe()) == (cache == "bfloat16")
        rows = zip(out.prompt_logprobs[1:], prompt[1:], strict=True)
        found.append([row[token].logprob for row, token in rows])
    away = [abs(a - b) for a, b in zip(*found, strict=True)]
    assert 0 < sum(away) / len(away) < 0.05  # of a logit: the weights are random


@pytest.mark.parametrize("name", sparing(["recall-dense", "countdown-moe"], "recall-dense"))
def test_a_shipped_model_loses_little(name: str):
    exact, *rounded = measure(SHIPPED / name, 32)
    for row, most in zip(rounded, (0.005, 0.05), strict=True):
        assert 0 < row["mean_difference"] < most
        assert row["perplexity"] == pytest.approx(exact["perplexity"], rel=most)


@pytest.mark.parametrize(
    ("model_type", "kernels"),
    [
        ("gpt_oss", "auto"),
        pytest.param("deepseek_v3", "auto", marks=pytest.mark.slow),
        pytest.param("deepseek_v3", "reference", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("cache", sparing(ROUNDED, "int8"))
def test_it_hits_sleeps_and_wakes(model_type: str, kernels: Any, cache: Any, tmp_path: Path):
    folder = write_checkpoint(tmp_path, model_type, tokenizer=False)
    settings: dict[str, Any] = {"progress": False, "tokenizer": False, "num_pages": 16}
    settings |= {"max_num_batched_tokens": 16, "max_num_seqs": 2, "max_model_len": 64}
    with LLM(folder, kv_cache_dtype=cache, kernels=kernels, **settings) as llm:
        prompt = {"prompt_token_ids": list(range(3, 43))}

        def said() -> list[int]:
            return llm.generate([prompt], GREEDY)[0].outputs[0].token_ids

        first = said()
        assert said() == first  # from the prefix cache
        llm.sleep()
        llm.wake_up()
        assert said() == first
        leaves = jax.tree.leaves(llm._runner.kv)
        assert {leaf.dtype.name for leaf in leaves} <= {"int8", "uint8", "float32"}
        assert sum(leaf.nbytes for leaf in leaves) == llm.plan.kv_bytes
