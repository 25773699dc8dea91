"""An engine says the same, to the bit, whether its rows are grouped or not."""

from __future__ import annotations

from dataclasses import replace
from functools import partialmethod
from pathlib import Path
from typing import Any

import jax
import pytest

from jaxserve import LLM
from jaxserve.config import EngineConfig
from jaxserve.engine.engine import Engine
from jaxserve.engine.generation import Generation
from jaxserve.engine.runner import Runner
from jaxserve.engine.sequence import Sequence
from jaxserve.models.family import family
from jaxserve.plan import resolve
from jaxserve.request import CompletionOutput, RequestMetrics, SamplingParams
from jaxserve.testing import write_checkpoint
from kernels_pallas import cpu
from kernels_pallas.op import Op
from kernels_pallas.paged_attention.mosaic_tpu import TpuTile
from sharding.tree import initialise
from tests.jaxserve.engine.test_lowering import AbsentDevice
from tests.sparing import sparing

HF = {
    "model_type": "qwen3", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
    "max_position_embeddings": 128, "rms_norm_eps": 1e-6, "rope_theta": 1e4,
    "torch_dtype": "float32", "hidden_act": "silu",
}  # fmt: skip
PAGE, BLOCK = 8, 16  # keys in a page, and in a block that the kernel attends at a time
PROMPT = [(7 * i + 3) % 60 for i in range(37)]


@pytest.fixture
def grouped(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Simulates the kernels of a TPU; whether each attention that was traced had groups."""
    found, run = list[bool](), Op.run

    def simulate(op: Op, name: str, *args: Any, **options: Any) -> Any:
        if op.name == "page_attention":
            assert name == "mosaic_tpu", "a kernel, and it declines nothing"
            found.append(args[4].groups is not None)
            options["tile"] = TpuTile(keys=BLOCK)
        return run(op, name, *args, interpret=name == "mosaic_tpu", **options)

    monkeypatch.setattr(Op, "run", partialmethod(simulate))
    return found


def engine(group_pages: int) -> Engine:
    module = family("qwen3")
    cfg = module.config(HF)
    config = EngineConfig(
        max_num_seqs=4, max_num_batched_tokens=16, num_pages=24, page_size=PAGE, dtype="float32"
    )
    plan = resolve(config, HF, cfg, lambda *_: 0, AbsentDevice("tpu"))
    plan = replace(plan, token_buckets=(16,), group_pages=group_pages)
    params = initialise(module.declare_params(cfg), cfg.sizes, "float32")
    runner = Runner(plan, module, cfg, params, jax.devices()[0])
    runner.warm_up(background=False, on_program=lambda *_: None)
    return Engine(runner)


def request(served: Engine, prompt: list[int], count: int, n: int) -> Generation:
    params = SamplingParams(n=n, max_tokens=count, temperature=0.8, logprobs=1)
    generation = Generation(f"{prompt} {n}", prompt, n, RequestMetrics(0.0), served.abort)
    served.add([
        Sequence(list(prompt), len(prompt), params, generation, b"root", i, (i, len(prompt)),
                 len(prompt) + count)
        for i in range(n)
    ])  # fmt: skip
    return generation


def texts(served: Engine) -> list[list[CompletionOutput]]:
    """Siblings, and prompts that begin as theirs do, some of which come later; one is preempted."""
    generations = [request(served, PROMPT, 40, 2), request(served, [5, *PROMPT], 40, 1)]
    for _ in range(7):
        served.step()
    generations += [request(served, [*PROMPT[:34], 1, 2, 3], 40, 1)]
    while served.has_work:
        served.step()
    served.runner.close()
    return [generation.result().outputs for generation in generations]


@pytest.mark.slow
def test_groups_change_no_bit(grouped: list[bool]) -> None:
    served = engine(BLOCK // PAGE)
    found = texts(served)
    assert any(grouped)
    stats = served.stats()
    assert stats.shared_keys_total > 40 * 32 and stats.num_preemptions > 0
    del grouped[:]
    plain = engine(0)
    expected = texts(plain)
    assert grouped and not any(grouped) and plain.stats().shared_keys_total == 0
    assert found == expected  # tokens and log-probabilities


@pytest.mark.skipif(not cpu.available(), reason="no C++ compiler")
@pytest.mark.parametrize("kv_cache_dtype", sparing(["auto", "int8", "int4"], "auto"))
def test_nobody_can_tell_who_shares_on_cpu(tmp_path: Path, kv_cache_dtype: str) -> None:
    """Siblings behind 150 tokens, and one that begins as they do and comes with them."""
    write_checkpoint(tmp_path, "qwen3_moe", tokenizer=False)
    prompt = [(7 * i + 3) % 60 for i in range(150)]
    params = [SamplingParams(n=n, max_tokens=12, logprobs=1, temperature=0.8) for n in (3, 1)]
    found = []
    for alone in (False, True):
        with LLM(
            tmp_path, tokenizer=False, progress=False, max_model_len=256, max_num_seqs=4,
            max_num_batched_tokens=64, kv_cache_dtype=kv_cache_dtype, disable_cascade_attn=alone,
        ) as llm:  # fmt: skip
            prompts = [{"prompt_token_ids": ids} for ids in (prompt, [*prompt[:130], 1, 2])]
            out = llm.generate(prompts, params)
            found.append([(o.token_ids, o.logprobs) for each in out for o in each.outputs])
            shared = llm.stats().shared_keys_total
            assert shared == 0 if alone else shared >= 11 * 2 * 128
    assert found[0] == found[1]
