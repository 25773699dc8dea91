"""Random models: few programs, and a report that says what is known so far."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

from benchmarks import random_model
from benchmarks.random_model import SHAPES, random_params, run, wanted
from jaxserve.config import EngineConfig
from jaxserve.models.family import family
from jaxserve.plan import resolve
from sharding.tree import is_weight, unstack
from tests.jaxserve.engine.test_lowering import AbsentDevice


def test_layers_of_one_shape_are_drawn_by_one_program():
    raw = SHAPES["tiny-moe"] | {"num_hidden_layers": 5}
    module = family(raw["model_type"])
    cfg = module.config(raw)
    tree = unstack(module.declare_params(cfg))
    declared = jax.tree.leaves(tree, is_leaf=is_weight)
    kinds = {(w.shape(cfg.sizes), w.init, w.dtype) for w in declared}
    random_model._drawn.clear_cache()
    drawn = jax.tree.leaves(random_params(tree, cfg.sizes, jnp.bfloat16))
    assert random_model._drawn._cache_size() <= len(kinds) + 1 < len(declared) / 3
    for w, x in zip(declared, drawn, strict=True):
        assert x.shape == w.shape(cfg.sizes) and x.dtype == (w.dtype or jnp.bfloat16)
    normal = [x for w, x in zip(declared, drawn, strict=True) if w.init == "normal"]
    sums = {float(jnp.abs(x.astype(jnp.float32)).sum()) for x in normal}
    assert len(sums) == len(normal), "no two leaves are alike"


def test_programs_whose_work_others_do_are_left_out():
    raw = SHAPES["8b"]
    cfg = family("qwen3").config(raw)
    config = EngineConfig(max_num_seqs=32, max_num_batched_tokens=2048, max_model_len=4096)
    plan = resolve(config, raw, cfg, lambda *_: 0, AbsentDevice("cuda"))
    plan = dataclasses.replace(plan, token_buckets=(32, 2048))
    kept = wanted(plan)
    assert set(plan.programs) - set(kept) == {("forward", 32), ("sample", 1)}
    assert {("step", 1), ("step", 32), ("forward", 2048), ("sample", 32)} <= set(kept)


def test_a_report_says_how_far_it_came(tmp_path, monkeypatch):
    """What was known is written before an engine, or a workload, ends the process."""
    out, seen = tmp_path / "r.json", list[dict]()

    def dies(raw, say, **_):
        say(weights_s=3.0)

        def generate(prompts, out_tokens):
            seen.append(json.loads(out.read_text()))
            if len(seen) == 4:
                raise MemoryError
            return [[0] * out_tokens for _ in prompts]

        return generate

    monkeypatch.setitem(random_model.LIBRARIES, "jaxserve", dies)
    with pytest.raises(MemoryError):
        run("tiny", "jaxserve", out)
    assert seen[0]["weights_s"] == 3.0 and seen[0]["workloads"] == []
    [found] = json.loads(out.read_text())["workloads"]
    assert len(found["seconds"]) == 2 and found["tokens_per_second"] > 0, "two rounds were over"


@pytest.mark.slow
def test_a_tiny_model_runs_in_the_engine(tmp_path):
    report = run("tiny", "jaxserve", tmp_path / "r.json", rounds=1)
    assert [w["tokens_per_second"] > 0 for w in report["workloads"]] == [True, True]
    assert len(report["compiled_s"]) == len(report["programs"])
    assert json.loads((tmp_path / "r.json").read_text())["compile_s"] == report["compile_s"]
