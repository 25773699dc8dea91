"""The shipped models are what their cards say: small, loadable everywhere, and about as good."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.reason_eval import draw_samples, evaluate, evaluate_head, task_of
from jaxserve import LLM, SamplingParams
from jaxserve.checkpoint import hf
from jaxserve.models import deepseek_v3_mtp
from jaxserve.models.attention import packed
from jaxserve.models.ops import Ops
from jaxserve.train.config import read_config
from reasoning.tasks import distinct
from sharding.tree import abstract
from tests.sparing import sparing

MODELS = Path(__file__).parents[1] / "models"
SHIPPED = sorted(path.parent for path in MODELS.glob("*/config.json"))
NAMES = [folder.name for folder in SHIPPED]
BOUNDS = {  # of pass@1; what the issue of a search experiment needs
    "modchain-moe": (0.35, 0.65),
    "modchain-moe-misled": (0.25, 0.55),
    "countdown-moe": (0.25, 0.80),
    "recall-dense": (0.75, 1.00),
}
REASONERS = [name for name in NAMES if name != "recall-dense"]

shipped = pytest.mark.parametrize("folder", SHIPPED, ids=NAMES)


def test_all_are_there():
    assert set(NAMES) == set(BOUNDS)


@shipped
def test_a_folder_is_small_and_whole(folder):
    files = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert sum(files.values()) < 8 << 20
    assert files.keys() >= {"README.md", "examples.json", "recipe.toml", "tokenizer.json"}
    recipe = MODELS / "recipes" / f"{folder.name}.toml"
    assert (folder / "recipe.toml").read_text() == recipe.read_text()
    read_config(recipe)


@shipped
def test_a_card_says_what_is_asked_of_it(folder):
    card = (folder / "README.md").read_text()
    for word in ("SHA-256", "seeds", "training time", "pass@1 ", "pass@4 ", "pass@16 ", "pass@64 ",
                 "majority@16 ", "majority@64 ", "confidence_auroc"):  # fmt: skip
        assert word in card
    assert re.search(r"hash to `[0-9a-f]{16}`", card)


@shipped
def test_examples_are_held_out_problems(folder):
    task = task_of(folder)
    examples = json.loads((folder / "examples.json").read_text())
    problems = distinct(task, "test", 0, 16)
    assert examples == [{"prompt": p.prompt, "answer": task.answer(p)} for p in problems]


@pytest.mark.slow
@pytest.mark.parametrize("folder", SHIPPED, ids=NAMES)
def test_it_is_about_as_good_as_its_card_says(folder):
    task = task_of(folder)
    with LLM(folder, progress=False) as llm:
        figures = evaluate(draw_samples(llm, task, distinct(task, "test", 0, 100), 16))
    low, high = BOUNDS[folder.name]
    assert low < figures["pass@1"][0] < high
    said = re.search(r"\| pass@1 \| ([\d.]+)", (folder / "README.md").read_text())
    assert said
    assert figures["pass@1"][0] == pytest.approx(float(said[1]), abs=0.12)


@pytest.mark.slow
@pytest.mark.parametrize("name", sparing(REASONERS, "modchain-moe"))
def test_reward_heads_tell_right_from_wrong(name):
    folder = MODELS / name
    with LLM(folder, progress=False) as llm:
        figures = evaluate_head(llm, folder, task_of(folder), "test", 40)
    good, weak = figures["reward_head_step_auroc"][0], figures["reward_head_weak_step_auroc"][0]
    assert 0.72 < good < 0.97
    assert 0.5 < weak < good


@shipped
def test_transformers_gives_the_same_scores(folder):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    prompt = json.loads((folder / "examples.json").read_text())[0]["prompt"]
    with LLM(folder, progress=False) as llm:
        asked = SamplingParams(temperature=0, max_tokens=24, prompt_logprobs=0, ignore_eos=True)
        (out,) = llm.generate([prompt], asked)
    ids = [*out.prompt_token_ids, *out.outputs[0].token_ids]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer(prompt)["input_ids"] == out.prompt_token_ids
    with torch.no_grad():
        scores = torch.log_softmax(theirs(torch.tensor([ids])).logits[0], -1).numpy()
    n = len(out.prompt_token_ids)
    assert scores[n - 1 : -1].argmax(-1).tolist() == out.outputs[0].token_ids
    found = [
        step[token].logprob
        for token, step in zip(out.prompt_token_ids[1:], out.prompt_logprobs[1:], strict=True)
    ]
    np.testing.assert_allclose(found, scores[range(n - 1), ids[1:n]], atol=2e-3)


@pytest.mark.slow
def test_the_layer_for_prediction_ahead_is_trained():
    """Its guess of the token after the next is right far more often than chance."""
    folder = MODELS / "countdown-moe"
    raw = hf.read_config(folder)
    cfg = hf.model_config(deepseek_v3_mtp, raw)
    params = hf.load_params(folder, deepseek_v3_mtp, cfg, "float32", progress=False)
    task = task_of(folder)
    with LLM(folder, progress=False) as llm:
        prompt = distinct(task, "test", 0, 1)[0].prompt
        (out,) = llm.generate([prompt], SamplingParams(temperature=0))
    ids = [*out.prompt_token_ids, *out.outputs[0].token_ids]
    row, at = jnp.asarray([ids[:-1]]), jnp.arange(len(ids) - 1)[None]
    ops = Ops(attend=packed(jnp.ones_like(row), at), dtype=jnp.float32)
    hidden, _ = deepseek_v3_mtp.forward(cfg, params, row, at, ops)
    further, _ = deepseek_v3_mtp.predict(cfg, params, hidden, jnp.asarray([ids[1:]]), at, ops)
    guess = np.asarray(deepseek_v3_mtp.logits(cfg, params, further, ops))[0].argmax(-1)
    begins = len(out.prompt_token_ids)
    right = guess[begins - 2 : -1] == np.asarray(ids[begins:])
    assert right.mean() > 0.6


def test_the_larger_recipe_is_of_the_size_it_says():
    config = read_config(MODELS / "recipes" / "countdown-moe-large.toml")
    cfg = hf.model_config(deepseek_v3_mtp, {**config.model.hf, "vocab_size": 80})
    declared = deepseek_v3_mtp.declare_params(cfg)
    shapes = jax.tree.leaves(abstract(declared, cfg.sizes, config.model.dtype))
    assert 10e6 < sum(x.size for x in shapes) < 50e6
