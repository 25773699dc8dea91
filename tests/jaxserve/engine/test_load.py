"""Many requests at once: nothing is compiled, nobody starves, and the host keeps out of the way."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

import kernels_pallas.cpu as cpu
from jaxserve import LLM, SamplingParams
from jaxserve.errors import CompileForbiddenError, EngineError
from jaxserve.request import StructuredOutputs
from kernels_pallas.cpu.build import library
from tests.jaxserve.engine.engines import checkpoint, serve

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    """64 sequences, and a pool of 4,096 tokens."""
    settings = {"max_num_seqs": 64, "max_num_batched_tokens": 64, "max_model_len": 1024}
    with serve(**settings, page_size=32, num_pages=128) as llm:
        yield llm


@pytest.fixture
def strict() -> Iterator[LLM]:
    """No compiling once it is warm."""
    with serve(decode_steps=4, forbid_compile=True) as llm:
        yield llm


def test_a_mixed_workload_compiles_nothing(strict: LLM):
    prompts = [list(range(5, 5 + n)) for n in (1, 2, 7, 8, 15, 16, 17, 60, 110)]
    kinds = [
        SamplingParams(max_tokens=9, temperature=0.0),
        SamplingParams(max_tokens=9, n=3, top_k=5, top_p=0.8, min_p=0.1),
        SamplingParams(max_tokens=9, logprobs=3, prompt_logprobs=2),
        SamplingParams(max_tokens=9, repetition_penalty=1.2, presence_penalty=0.5),
        SamplingParams(max_tokens=9, frequency_penalty=0.5, temperature=0.0),
        SamplingParams(max_tokens=9, logit_bias={7: 2.0}, min_tokens=3),
        SamplingParams(max_tokens=9, stop=["e"], stop_token_ids=[11]),
        SamplingParams(max_tokens=9, structured_outputs=StructuredOutputs(regex="[a-z]{5}")),
    ]
    for kind in kinds:
        strict.generate(prompts, kind)
    generations = [strict.submit(p, k) for p in prompts for k in kinds]
    for generation in generations[::3]:
        generation.abort()
    strict.embed(prompts)
    strict.embed(prompts, "mean")
    for generation in generations:
        assert generation.result().finished
    strict.reset_prefix_cache()
    strict.sleep()
    strict.wake_up()
    strict.generate(prompts, kinds[0])
    stats = strict.stats()
    assert stats.compiles_after_warmup == 0
    assert stats.num_compiled_programs == strict.plan.num_programs
    assert stats.num_free_pages == stats.num_pages


def test_compiling_is_forbidden_until_shutdown(strict: LLM):
    with pytest.raises(CompileForbiddenError, match="compiled after warm-up"):
        jax.jit(lambda x: x * 17 + 5)(np.ones(3))
    strict.shutdown()
    assert jax.jit(lambda x: x * 17 + 6)(np.ones(3))[0] == 23


@pytest.mark.slow
def test_overload_finishes_and_says_what_it_would_alone(llm: LLM):
    """24 requests of 900 tokens; 4,096 fit at a time."""
    prompts = [[5 + i, *range(6, 105)] for i in range(24)]
    params = SamplingParams(max_tokens=800, ignore_eos=True, temperature=0.0)
    before = llm.stats().num_preemptions
    outs = llm.generate(prompts, params)
    assert [len(out.outputs[0].token_ids) for out in outs] == [800] * 24
    assert llm.stats().num_preemptions > before
    for i in (0, 11, 23):
        assert llm.generate(prompts[i], params)[0].outputs == outs[i].outputs
    stats = llm.stats()
    assert stats.num_free_pages == stats.num_pages


def test_the_host_needs_little_time_for_a_step_of_64(llm: LLM):
    """A counter, not a race: the bound only tells a loop from a catastrophe."""
    params = SamplingParams(max_tokens=50, ignore_eos=True)
    before = llm.stats()
    llm.generate([[i + 5, 7, 9] for i in range(64)], params)
    after = llm.stats()
    steps = after.num_steps - before.num_steps
    each = (after.host_seconds_total - before.host_seconds_total) / steps
    print(f"{1e6 * each:.0f} µs of the host's time for each of {steps} steps of 64 sequences")
    assert steps < 80
    assert each < 0.05


def test_requests_from_many_threads(llm: LLM):
    """Each gets its own answer, and an engine that is shut down beneath them says so."""
    wrong: list[object] = []

    def use(i: int) -> None:
        params = SamplingParams(seed=i, max_tokens=8, ignore_eos=True)
        said = {tuple(llm.generate([9, i + 5], params)[0].outputs[0].token_ids) for _ in range(5)}
        if len(said) != 1:
            wrong.append(said)

    threads = [threading.Thread(target=use, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.timeout(120)
def test_tokens_come_before_all_programs_exist():
    """In the background the rest is compiled, and whoever waits for it sees it done."""
    settings = {"max_num_batched_tokens": 32, "background_compile": True}
    with serve(**settings, page_size=16) as llm:
        (out,) = llm.generate([list(range(5, 60))], SamplingParams(max_tokens=5, ignore_eos=True))
        assert len(out.outputs[0].token_ids) == 5
        llm.wait_until_warm()
        assert llm.stats().num_compiled_programs == llm.plan.num_programs
        assert llm.stats().compiles_after_warmup == 0
        again = llm.generate([list(range(5, 60))], SamplingParams(max_tokens=5, seed=3))
        assert again[0].outputs[0].token_ids


@pytest.mark.skipif(not cpu.available(), reason="no C++ compiler")
@pytest.mark.timeout(120)
def test_tokens_come_before_the_native_kernels_are_built(monkeypatch: pytest.MonkeyPatch):
    """The first program runs the reference; the native one takes its place and says the same."""
    built = threading.Event()
    monkeypatch.setattr(cpu, "ready", lambda: False)
    monkeypatch.setattr(cpu, "available", lambda: built.wait(100))
    with serve(max_num_batched_tokens=32, background_compile=True) as llm:
        assert llm.plan.kernels == "native"
        params = SamplingParams(max_tokens=12, ignore_eos=True, temperature=0.0)
        before = llm.generate([list(range(5, 60))], params)
        assert llm.stats().num_compiled_programs == 2
        first = dict(llm._runner._programs)
        built.set()
        llm.wait_until_warm()
        assert all(llm._runner._programs[key] is not first[key] for key in first)
        assert llm.stats().num_compiled_programs == llm.plan.num_programs
        assert llm.generate([list(range(5, 60))], params)[0].outputs == before[0].outputs


@pytest.mark.slow
@pytest.mark.skipif(not cpu.available(), reason="no C++ compiler")
@pytest.mark.timeout(120)
def test_a_failed_build_leaves_a_server_with_reference_kernels(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cpu, "ready", lambda: False)
    monkeypatch.setattr(cpu, "available", lambda: False)
    with serve(max_num_batched_tokens=32, background_compile=True) as llm:
        llm.wait_until_warm()
        assert llm.stats().num_compiled_programs == llm.plan.num_programs
        (out,) = llm.generate([[5, 6, 7]], SamplingParams(max_tokens=4, ignore_eos=True))
        assert len(out.outputs[0].token_ids) == 4


@pytest.mark.timeout(120)
def test_shutdown_does_not_wait_for_what_is_compiling():
    started = time.monotonic()
    llm = serve(max_num_batched_tokens=512, max_num_seqs=64, background_compile=True)
    llm.shutdown()
    with pytest.raises(EngineError):
        llm.generate([5, 6])
    assert llm._runner.num_programs == 0
    assert time.monotonic() - started < 100


START = """
import sys, time
started = time.monotonic()
from jaxserve import LLM, SamplingParams
from jaxserve.engine.compile_watch import watch
llm = LLM(sys.argv[1], dtype="float32", max_num_seqs=8, max_num_batched_tokens=8, progress=False)
llm.generate("a", SamplingParams(max_tokens=1))
first = time.monotonic() - started
llm.wait_until_warm()
print(watch.compiled - watch.loaded, watch.compiled, f"{first:.2f}")
"""


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_second_start_compiles_nothing(tmp_path: Path):
    env = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    env |= {"JAX_PLATFORMS": "cpu", "JAXSERVE_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}

    if (kernels := library()) is not None:  # a compiler's twenty seconds are another test's
        (tmp_path / "native").mkdir()
        shutil.copy(kernels, tmp_path / "native")

    def start() -> list[float]:
        command = [sys.executable, "-c", START, str(checkpoint())]
        child = subprocess.run(command, env=env, capture_output=True, text=True)
        assert child.returncode == 0, child.stderr
        return [float(number) for number in child.stdout.split()]

    (cold, programs, first), (warm, again, second) = start(), start()
    print(f"first token after {first} s cold, {second} s warm, with python and its imports")
    assert cold > 0
    assert warm == 0
    assert again == programs
