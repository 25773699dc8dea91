"""Weights that change while the engine serves: no request sees two versions, nothing compiles."""

import dataclasses
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve import SamplingParams
from jaxserve.errors import ConfigError, EngineError
from tests.jaxserve.engine.engines import checkpoint, dawdle, serve

PROMPTS = [[5, 6, 7, 8] * n for n in (1, 4, 9)]
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


def other(params, factor=-1.0):
    """A model that says something else."""
    norm = np.asarray(params.final_norm) * np.asarray(factor, params.final_norm.dtype)
    return dataclasses.replace(params, final_norm=norm)


def said(llm, prompts=PROMPTS, params=GREEDY):
    outs = llm.generate([{"prompt_token_ids": p} for p in prompts], params)
    return [out.outputs[0].token_ids for out in outs], {out.metrics.params_version for out in outs}


@pytest.fixture
def llm():
    with serve(forbid_compile=True) as llm:
        llm.wait_until_warm()
        yield llm


def test_other_weights_are_served_without_compiling(llm):
    first, version = said(llm)
    assert version == {0}
    old = jax.tree.map(np.array, llm.params)
    new = jax.tree.map(np.array, other(llm.params))
    assert llm.load_params(new) == 1
    second, version = said(llm)  # a prefix that is cached must not come from the old weights
    assert version == {1}
    assert second != first
    assert llm.load_params(old) == 2
    assert said(llm) == (first, {2})
    assert llm.stats().compiles_after_warmup == 0


def test_the_tree_is_copied(llm):
    first, _ = said(llm)
    mine = jax.tree.map(lambda x: jax.device_put(np.array(x)), llm.params)
    llm.load_params(mine)
    for leaf in jax.tree.leaves(mine):  # as a training step that donates it does
        leaf.delete()
    assert said(llm)[0] == first


def test_requests_that_have_begun_end_with_the_weights_they_began_with(llm):
    """Many at once, more than can run: none mixes, and none is lost."""
    long = dataclasses.replace(GREEDY, max_tokens=60, n=2)
    prompts = [{"prompt_token_ids": [7, 8, 9, i]} for i in range(20)]
    alone = {}
    params = [jax.tree.map(np.array, llm.params), jax.tree.map(np.array, other(llm.params))]
    for version in (1, 2):
        llm.load_params(params[version - 1])
        outs = llm.generate(prompts, long)
        alone[version % 2] = [[o.token_ids for o in out.outputs] for out in outs]
    generations = [llm.submit(p["prompt_token_ids"], long) for p in prompts]  # version 2
    swap = threading.Thread(target=llm.load_params, args=(params[0],))
    swap.start()
    later = [llm.submit(p["prompt_token_ids"], long) for p in prompts]
    outs = [generation.result() for generation in generations + later]
    swap.join()
    versions = [out.metrics.params_version for out in outs]
    assert set(versions) <= {2, 3}
    assert versions[-1] == 3
    for i, (out, version) in enumerate(zip(outs, versions, strict=True)):
        assert [o.token_ids for o in out.outputs] == alone[version % 2][i % len(prompts)]
    stats = llm.stats()
    assert stats.num_free_pages == stats.num_pages


def test_several_swaps_wait_for_one_another(llm, monkeypatch):
    trees = [jax.tree.map(np.array, other(llm.params, f)) for f in (-1.0, 2.0)]
    dawdle(llm, monkeypatch)
    busy = llm.submit([5, 6, 7], dataclasses.replace(GREEDY, max_tokens=80))
    while not llm.stats().num_running:  # who only waits may begin with new weights
        time.sleep(0.001)
    versions = []
    threads = [
        threading.Thread(target=lambda tree=tree: versions.append(llm.load_params(tree)))
        for tree in trees
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(versions) == [1, 2]
    assert busy.result().metrics.params_version == 0


@pytest.mark.slow
def test_types_and_stacks_are_the_engines_own():
    with serve(dtype="bfloat16") as llm:
        first, _ = said(llm)
        wide = jax.tree.map(lambda x: np.asarray(x, np.float32), llm.params)
        assert llm.load_params(wide) == 1
        assert said(llm)[0] == first
        assert llm.params.embed.dtype == jnp.bfloat16


def test_wrong_trees_are_refused_by_the_name_of_a_leaf(llm):
    before, _ = said(llm)
    wrong = dataclasses.replace(llm.params, final_norm=np.ones(3, np.float32))
    with pytest.raises(ConfigError, match=r"final_norm is of shape \[3\]; the engine serves"):
        llm.load_params(wrong)
    with pytest.raises(ConfigError, match=r"embed is missing"):
        llm.load_params(dataclasses.replace(llm.params, embed=None))
    assert said(llm)[0] == before


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text"])  # the second's head is its table
def test_an_eight_bit_engine_takes_its_own_weights_and_floats(family):
    with serve(checkpoint(family), quantization="int8") as llm, serve(checkpoint(family)) as floats:
        first, _ = said(llm)
        for tree in (llm.params, jax.tree.map(np.array, llm.params), floats.params):
            llm.load_params(tree)
            assert said(llm)[0] == first
        shuffled = np.array(llm.params.embed)[::-1]
        llm.load_params(dataclasses.replace(llm.params, embed=shuffled))
        floats.load_params(dataclasses.replace(floats.params, embed=shuffled))
        llm.load_params(floats.params)  # a tied head follows its table
        second, _ = said(llm)
        llm.load_params(dataclasses.replace(llm.params, embed=shuffled))
        assert said(llm)[0] == second != first


def test_wrong_trees_are_refused_by_the_name_of_a_leaf_in_eight_bits():
    with serve(quantization="int8") as llm:
        p = llm.params
        for wrong, message in (
            (dataclasses.replace(p, embed=None), "embed is missing; the engine serves"),
            (dataclasses.replace(p, lm_head=None), "lm_head is missing; the engine serves"),
            (dataclasses.replace(p, final_norm=np.ones(3, np.float32)), r"final_norm is of shape"),
            (dataclasses.replace(p, stacks=p.stacks * 2), "cannot be stacked as"),
            ({"embed": p.embed}, "params are a dict; expected the model's Params"),
        ):
            with pytest.raises(ConfigError, match=message):
                llm.load_params(wrong)


def test_waiting_for_ever_can_be_avoided_and_shut_down_answers(monkeypatch):
    llm = dawdle(serve(), monkeypatch, 0.1)
    busy = llm.submit([5, 6, 7], dataclasses.replace(GREEDY, max_tokens=100))
    while not llm.stats().num_running:  # else nobody is waited for
        time.sleep(0.001)
    tree = jax.tree.map(np.array, llm.params)
    with pytest.raises(TimeoutError):
        llm.load_params(tree, timeout=0)
    llm.shutdown()
    with pytest.raises(EngineError):
        busy.result()
    with pytest.raises(EngineError, match="shut down"):
        llm.load_params(tree)
