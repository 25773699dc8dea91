"""Whole runs: they learn, go on where they were killed, and end as models that are served."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve import LLM, SamplingParams
from jaxserve.cli.prepare import prepare
from jaxserve.errors import CheckpointError, ConfigError
from jaxserve.models.attention import packed
from jaxserve.models.ops import Ops
from jaxserve.train.config import (
    AdapterConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    SaveConfig,
)
from jaxserve.train.loop import fit, train
from tests.jaxserve.train import runs
from tests.sparing import sparing


@dataclass(frozen=True)
class Breaks:
    """A source that fails at some document."""

    source: Any
    at: int

    def document(self, index):
        if index == self.at:
            raise KeyboardInterrupt
        return self.source.document(index)


def scores(run, params, tokens):
    """Logits [T, V] of the training forward pass."""
    row, at = jnp.asarray([tokens]), jnp.arange(len(tokens))[None]
    ops = Ops(attend=packed(jnp.ones_like(row), at), dtype=jnp.float32)
    x, _ = run.family.forward(run.cfg, params, row, at, ops)
    return np.asarray(run.family.logits(run.cfg, params, x, ops))[0]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run to its end: (run, its folder, the exported model)."""
    folder = tmp_path_factory.mktemp("run")
    run = runs.job(folder)
    return run, folder, train(run, progress=False)


@pytest.mark.slow
def test_the_weights_it_began_with_are_still_there(trained):
    run, _, _ = trained
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(run.params))


def test_a_run_learns_and_says_so(trained):
    _, folder, _ = trained
    lines = runs.metrics(folder)
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]
    assert all(0.9 < line["balance"] < 2 for line in lines)
    assert all(line["tokens"] > 100 for line in lines)


def test_an_interrupted_run_goes_on_as_if_it_had_not_been(trained, tmp_path):
    _, whole, _ = trained
    run = runs.job(tmp_path)
    broken = dataclasses.replace(run, source=Breaks(run.source, 45))
    with pytest.raises(KeyboardInterrupt):
        fit(broken, progress=False)
    fit(run, progress=False)
    assert runs.metrics(tmp_path) == runs.metrics(whole)


def test_the_exported_model_is_served(trained):
    run, _, folder = trained
    with LLM(folder, progress=False) as llm:
        prompt = "3 4 5 :"
        (out,) = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=8, logprobs=0))
        ids = llm.tokenizer.encode(prompt)
        want = scores(run, llm.params, [*ids, *out.outputs[0].token_ids])
        greedy = want[len(ids) - 1 : -1].argmax(-1).tolist()
        assert out.outputs[0].token_ids == greedy
        chat = llm.chat([{"role": "user", "content": "3 4 5"}], SamplingParams(max_tokens=1))
        assert chat[0].prompt_token_ids == ids


@pytest.mark.parametrize(
    "hf",
    sparing([runs.QWEN3_MOE, runs.QWEN3, runs.DEEPSEEK_V3], runs.QWEN3_MOE),
    ids=lambda c: c["model_type"],
)
def test_transformers_loads_the_export_and_agrees(hf, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    run = runs.job(tmp_path, hf, steps=2, save=SaveConfig(str(tmp_path), every=2))
    folder = train(run, progress=False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("3 4 5 : 3 4 = 5 ; 5 5 |")["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "3 4 5 : 3 4 = 5 ; 5 5 |"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        want = model(torch.tensor([ids])).logits[0].numpy()
    params = fit(run, progress=False)  # nothing is left to do
    np.testing.assert_allclose(scores(run, params, ids), want, atol=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("layers", ["sliced", "recomputed"])
def test_recomputing_changes_nothing(layers, trained, tmp_path):
    _, whole, _ = trained
    fit(runs.job(tmp_path, layers=layers, steps=12), progress=False)
    losses = [[line["loss"] for line in runs.metrics(f)] for f in (tmp_path, whole)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)


@pytest.mark.slow
def test_bfloat16(tmp_path):
    model = ModelConfig(config=runs.QWEN3_MOE, dtype="bfloat16")
    folder = train(runs.job(tmp_path, model=model, steps=3), progress=False)
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert np.isfinite([line["loss"] for line in runs.metrics(tmp_path)]).all()


# ---- adapters ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_lora_trains_its_additions_alone(trained, tmp_path):
    _, _, base = trained
    adapter = AdapterConfig("lora", rank=4, targets=("wq", "wo"))
    run = prepare(runs.adapted(tmp_path, base, adapter))
    params = fit(run, progress=False)
    before = dict(jax.tree_util.tree_leaves_with_path(run.params))
    moved = {
        jax.tree_util.keystr(path).rpartition(".")[2]
        for path, w in jax.tree_util.tree_leaves_with_path(params)
        if not np.array_equal(w, before[path])
    }
    assert moved == {"wq", "wo"}
    lines = runs.metrics(tmp_path)
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert jax.tree.structure(params) == jax.tree.structure(run.params)


def test_lora_starts_at_the_model_it_was_given(trained, tmp_path):
    _, _, base = trained
    plain = prepare(runs.config(tmp_path / "a", model=ModelConfig(path=str(base)), steps=1))
    lora = prepare(runs.adapted(tmp_path / "b", base, AdapterConfig("lora"), steps=1))
    fit(plain, progress=False)
    fit(lora, progress=False)
    first = [runs.metrics(tmp_path / x)[0]["loss"] for x in "ab"]
    assert first[0] == pytest.approx(first[1], abs=1e-5)


def test_targets_that_name_nothing(trained, tmp_path):
    _, _, base = trained
    run = prepare(runs.adapted(tmp_path, base, AdapterConfig("lora", targets=("q_proj",))))
    with pytest.raises(ConfigError, match=r"q_proj.* name no weight; there are .*wq"):
        fit(run, progress=False)


# ---- bad input ---------------------------------------------------------------------------------


def test_a_checkpoint_of_another_run_is_refused(trained, tmp_path):
    _, folder, _ = trained
    other = runs.job(tmp_path, runs.QWEN3, save=SaveConfig(str(folder), every=3))
    with pytest.raises(CheckpointError, match=r"checkpoint of step 12 .* has trained=.*another"):
        fit(other, progress=False)
    longer = runs.job(tmp_path, save=SaveConfig(str(folder), every=3), steps=20)
    with pytest.raises(CheckpointError, match="has steps=12, but this run 20"):
        fit(longer, progress=False)


def test_a_task_or_a_setting_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match=r"task 'chess' is not known; there are modchain"):
        runs.job(tmp_path, data=DataConfig(task="chess"))
    with pytest.raises(ConfigError, match=r"settings of 'modchain'.*colour"):
        runs.job(tmp_path, data=DataConfig(task="modchain", settings={"colour": 1}))


SCRIPT = """
import sys, resource
from pathlib import Path
from tests.jaxserve.train import runs
from jaxserve.train.loop import train
from jaxserve.errors import JaxServeError
if len(sys.argv) > 2:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
try:
    print(train(runs.job(Path(sys.argv[1]), steps=60), progress=False))
except JaxServeError as error:
    print(f"error: {error}")
    sys.exit(1)
"""


def command(*args):
    return [sys.executable, "-c", SCRIPT, *map(str, args)]


def finished(*args):
    """A run in a process of its own, without the cache that a full disk would break."""
    env = {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "0"}
    return subprocess.run(command(*args), env=env, capture_output=True, text=True)


@pytest.mark.slow
def test_killed_at_any_moment_it_loses_one_interval_at_most(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert finished(whole).returncode == 0
    for _ in range(3):
        with subprocess.Popen(command(broken)) as process:
            time.sleep(6 + 2 * np.random.default_rng(0).random())
            os.kill(process.pid, signal.SIGKILL)
        seen = len(runs.metrics(broken)) if (broken / "metrics.jsonl").exists() else 0
        saved = [int(p.name) for p in (broken / "checkpoints").glob("[0-9]*") if p.name.isdigit()]
        assert seen - max(saved, default=0) <= 3 + 20  # metrics are read twenty steps at a time
    assert finished(broken).returncode == 0
    assert runs.metrics(broken) == runs.metrics(whole)


@pytest.mark.slow
def test_a_full_disk_is_one_error_and_the_last_checkpoint_stays(tmp_path):
    run = runs.job(tmp_path, steps=60)
    broken = dataclasses.replace(run, source=Breaks(run.source, 45))
    with pytest.raises(KeyboardInterrupt):
        fit(broken, progress=False)
    full = finished(tmp_path, 20_000)
    assert full.returncode == 1, full.stderr
    assert "could not be written" in full.stdout
    assert "can be loaded" in full.stdout
    assert finished(tmp_path).returncode == 0


@pytest.fixture(scope="module")
def prompted(trained, tmp_path_factory):
    """A soft prompt's run over that model: (run, its folder, the exported model)."""
    _, _, base = trained
    folder = tmp_path_factory.mktemp("soft")
    adapter = AdapterConfig("soft_prompt", num_virtual_tokens=4)
    rate = OptimizerConfig(learning_rate=5e-2, warmup_steps=2)
    run = prepare(runs.adapted(folder, base, adapter, optimizer=rate, length=60))
    return run, folder, train(run, progress=False)


def test_a_soft_prompt_trains_its_embeddings_alone(prompted):
    run, folder, _ = prompted
    params = fit(run, progress=False)  # nothing is left to do
    first = run.adapter.first
    for path, (a, b) in zip_leaves(params, run.params):
        same = np.array_equal(a, b)
        assert same == ("embed" not in path and "lm_head" not in path), path
        if not same:
            np.testing.assert_array_equal(a[:first], b[:first])
    lines = runs.metrics(folder)
    assert lines[-1]["loss"] < lines[0]["loss"]


def zip_leaves(one, two):
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(two), strict=True
    ):
        yield jax.tree_util.keystr(path), (np.asarray(a), np.asarray(b))


@pytest.mark.slow
def test_a_soft_prompt_stands_before_every_text_that_is_served(prompted):
    run, _, folder = prompted
    own = list(range(run.adapter.first, run.adapter.first + 4))
    with LLM(folder, progress=False) as llm:
        prompt = "3 4 5 :"
        (out,) = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=8))
        assert out.prompt_token_ids[:4] == own
        chat = llm.chat([{"role": "user", "content": "3 4 5"}], SamplingParams(max_tokens=1))
        assert chat[0].prompt_token_ids == out.prompt_token_ids
        want = scores(run, llm.params, [*out.prompt_token_ids, *out.outputs[0].token_ids])
        greedy = want[len(out.prompt_token_ids) - 1 : -1].argmax(-1).tolist()
        assert out.outputs[0].token_ids == greedy


def test_transformers_loads_a_soft_prompt_and_agrees(prompted):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    run, _, folder = prompted
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("3 4 5 : 3 4 = 5")["input_ids"]
    assert ids[:4] == list(range(run.adapter.first, run.adapter.first + 4))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        want = model(torch.tensor([ids])).logits[0].numpy()
    np.testing.assert_allclose(scores(run, fit(run, progress=False), ids), want, atol=2e-4)
