"""Experts move between steps of a running engine, and nobody can tell by what is said."""

from __future__ import annotations

import time
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve import LLM, SamplingParams
from jaxserve.checkpoint import hf
from jaxserve.errors import ConfigError
from jaxserve.models.attention import packed
from jaxserve.models.family import family
from jaxserve.models.ops import Ops
from tests.jaxserve.engine.engines import Driver, checkpoint, serve
from tests.sparing import sparing

SPLIT: dict[str, Any] = {
    "expert_parallel_size": 4,
    "num_redundant_experts": 4,
    "forbid_compile": True,
}
PARAMS = [
    SamplingParams(temperature=0, max_tokens=40, ignore_eos=True),
    SamplingParams(temperature=0.9, max_tokens=40, seed=3, ignore_eos=True, n=2),
]


def prompts() -> list[list[int]]:
    rng = np.random.default_rng(1)
    return [[int(t) for t in rng.integers(5, 300, 5 + 4 * i)] for i in range(6)]


def started(driver: Driver) -> list[Any]:
    return [driver.add(ids, PARAMS[i % 2]) for i, ids in enumerate(prompts())]


def tokens(generations: list[Any]) -> list[Any]:
    return [[c.token_ids for c in g.result().outputs] for g in generations]


def fullest(llm: LLM, load: np.ndarray, expert_of: np.ndarray) -> np.ndarray:
    """Tokens of the device with the most, in each layer that has experts."""
    assert llm.plan.dispatch is not None and llm._balance is not None
    layout, layers = llm.plan.dispatch.layout, llm._balance._layers
    pairs = zip(load[layers], expert_of, strict=True)
    return np.array([layout.device_load(one, where).max() for one, where in pairs])


def chosen(model_type: str, tokens: list[int]) -> np.ndarray:
    """How often a pass over these tokens asks for each expert [L, E], counted on the host."""
    folder = checkpoint(model_type)
    raw, model = hf.read_config(folder), family(model_type)
    cfg = hf.model_config(model, raw)
    params = hf.load_params(folder, model, cfg, jnp.float32, progress=False)
    E, row = cfg.router.num_experts, jnp.arange(len(tokens), dtype=jnp.int32)[None]
    ops = Ops(
        attend=packed(jnp.ones_like(row), row),
        dtype=jnp.float32,
        record=lambda seen, layer, router, scores, ids: seen.at[layer].set(ids),
    )
    none = jnp.full((cfg.num_layers, len(tokens), cfg.router.top_k), E, jnp.int32)
    ids = np.asarray(model.forward(cfg, params, jnp.asarray([tokens]), row, ops, none)[1])
    return np.stack([np.bincount(layer.reshape(-1), minlength=E + 1)[:E] for layer in ids])


@pytest.mark.mesh
@pytest.mark.parametrize("model_type", sparing(["qwen3_moe", "deepseek_v3"], "qwen3_moe"))
def test_moving_experts_in_the_middle_changes_no_token(model_type: str):
    with serve(checkpoint(model_type), **SPLIT) as llm:
        still = Driver(llm)
        expected = started(still)
        still.run()
        assert llm.plan.dispatch is not None and llm._balance is not None
        driver, moves = Driver(llm), []
        generations = started(driver)
        for _ in range(5):
            for _ in range(4):
                driver.step()
            counts = driver.engine.expert_load()
            assert not counts.done(), "the step that it is behind has not been read"
            driver.step()
            driver.step()
            load, old = counts.result(0), llm._runner.expert_of
            layout = llm.plan.dispatch.layout
            new = layout.rebalance(load[llm._balance._layers], layout.placement(old)).expert_of
            moves.append(int((new != old).sum()))
            driver.engine.place_experts(new)
        driver.run()
        assert tokens(generations) == tokens(expected)
        assert sum(moves) > 0
        assert driver.engine.stats().num_rebalances == len(moves)
        assert llm.stats().compiles_after_warmup == 0


@pytest.mark.mesh
@pytest.mark.slow
def test_experts_move_by_their_load_while_requests_run():
    with serve(checkpoint("qwen3_moe"), eplb_step_interval=60, **SPLIT) as llm:
        one = llm.generate([{"prompt_token_ids": prompts()[0]}], PARAMS[0])[0]
        computed = [*prompts()[0], *one.outputs[0].token_ids[:-1]]
        load, before = llm.expert_load(), llm._runner.expert_of
        assert llm.rebalance_experts() == (llm._runner.expert_of != before).sum() > 0
        assert fullest(llm, load, llm._runner.expert_of).sum() < fullest(llm, load, before).sum()
        assert not llm.expert_load().any(), "counted anew"
        many = [{"prompt_token_ids": ids} for ids in prompts()]
        expected = llm.generate(many, PARAMS[0])
        running = [llm.submit(ids, PARAMS[0]) for ids in prompts()]
        first = next(iter(running[0]))
        moved = llm.rebalance_experts()
        assert first.token_ids and llm.stats().num_running + llm.stats().num_waiting > 0
        said = [g.result().outputs[0].token_ids for g in running[1:]]
        assert moved > 0 and said == [o.outputs[0].token_ids for o in expected[1:]]
        count, deadline = llm.stats().num_rebalances, time.monotonic() + 60
        while llm.stats().num_rebalances == count and time.monotonic() < deadline:
            llm.generate(many[:2], SamplingParams(temperature=1.0, max_tokens=60))
        stats = llm.stats()
        assert stats.num_rebalances > count, "the interval has passed"
        assert stats.num_free_pages == stats.num_pages and not stats.compiles_after_warmup
    np.testing.assert_array_equal(load, chosen("qwen3_moe", computed))


def test_experts_that_cannot_move_are_told():
    with serve() as llm:
        for asked in (llm.rebalance_experts, llm.expert_load):
            with pytest.raises(ConfigError, match="set expert_parallel_size to spread them"):
                asked()
    with pytest.raises(ConfigError, match=r"eplb_step_interval=5 moves .*; set expert_parallel_"):
        serve(eplb_step_interval=5)
    with pytest.raises(ConfigError, match="eplb_step_interval=0 must be a whole number"):
        serve(eplb_step_interval=0)
