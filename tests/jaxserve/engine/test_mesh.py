"""The engine on a mesh says what it says on one device, however the work is split."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest

from jaxserve import LLM, SamplingParams
from jaxserve.errors import ConfigError
from tests.jaxserve.engine.engines import Driver, checkpoint, serve
from tests.sparing import sparing

PARAMS = [
    SamplingParams(temperature=0, max_tokens=10, logprobs=1),
    SamplingParams(temperature=0.8, max_tokens=10, seed=3, presence_penalty=0.5, n=2),
    SamplingParams(temperature=1.1, max_tokens=6, seed=5, top_k=20, logit_bias={7: 2.0}),
]


def prompts() -> list[dict[str, list[int]]]:
    """Seven of different lengths, some with a beginning in common, longer than a chunk."""
    start = list(np.random.default_rng(0).integers(5, 300, 20))
    return [{"prompt_token_ids": [int(t) for t in start[: 3 * i]] + [7 + i]} for i in range(7)]


def said(llm: LLM) -> list[Any]:
    params = [PARAMS[i % len(PARAMS)] for i in range(7)]
    outputs = llm.generate(prompts(), params)
    return [[choice.token_ids for choice in output.outputs] for output in outputs]


@functools.cache
def alone(model_type: str, **settings: Any) -> list[Any]:
    with serve(checkpoint(model_type), **settings) as llm:
        return said(llm)


SPLITS = [
    ("qwen3", {"tensor_parallel_size": 2}),
    ("qwen3", {"tensor_parallel_size": 4, "data_parallel_size": 2}),
    ("qwen3_moe", {"expert_parallel_size": 4, "tensor_parallel_size": 2}),
    ("deepseek_v3", {"expert_parallel_size": 8}),
    ("deepseek_v3", {"expert_parallel_size": 2, "num_redundant_experts": 2, "enable_dbo": True}),
    ("qwen3", {"data_parallel_size": 4}),
    ("gemma3_text", {"tensor_parallel_size": 2, "data_parallel_size": 2}),
    ("gpt_oss", {"tensor_parallel_size": 2}),
    ("qwen3_moe", {"tensor_parallel_size": 2, "data_parallel_size": 4}),
    ("mixtral", {"expert_parallel_size": 4, "data_parallel_size": 8}),
    ("deepseek_v2", {"expert_parallel_size": 4, "tensor_parallel_size": 4}),
]


@pytest.mark.mesh
@pytest.mark.parametrize(("model_type", "split"), sparing(SPLITS, SPLITS[2]))
def test_the_same_is_said_on_a_mesh(model_type: str, split: dict[str, int]):
    expected = alone(model_type)  # first, so that what it compiles is not counted here
    with serve(checkpoint(model_type), **split) as llm:
        assert said(llm) == expected
        stats = llm.stats()
        assert stats.num_free_pages == stats.num_pages > 0
        assert stats.compiles_after_warmup == 0


@pytest.mark.mesh
def test_ranks_share_the_work():
    with serve(data_parallel_size=4) as llm:
        driver = Driver(llm)
        for prompt in prompts():
            driver.add(prompt["prompt_token_ids"], PARAMS[0])
        driver.step()
        driver.step()
        counts = [len(rank.running) + len(rank.waiting) for rank in driver.engine.ranks]
        assert sorted(counts) == [1, 2, 2, 2]
        driver.run()


@pytest.mark.slow
@pytest.mark.mesh
def test_eight_bits_and_other_weights_on_a_mesh():
    """Rows are rounded on their way to experts, and answers on theirs: wherever experts live."""
    eight: dict[str, Any] = {"quantization": "int8", "num_redundant_experts": 1}
    with serve(checkpoint("qwen3_moe"), expert_parallel_size=4, **eight) as llm:
        assert said(llm) == alone("qwen3_moe", expert_parallel_size=2, quantization="int8")
    with serve(tensor_parallel_size=2, load_format="dummy") as llm, serve() as other:
        assert said(llm) != said(other)
        llm.load_params(other.params)
        assert said(llm) == said(other)


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ({"tensor_parallel_size": 3}, "mlp=128 does not divide into 3 parts.* nearest.* is 2"),
        ({"expert_parallel_size": 2}, "no experts; set tensor_parallel_size"),
        ({"expert_parallel_size": 4, "data_parallel_size": 2}, "expert=4 must be 1, or"),
        ({"enable_dbo": True}, "set expert_parallel_size"),
        ({"tensor_parallel_size": 2, "decode_steps": 2}, "decode_steps=2 needs one device"),
        ({"data_parallel_size": 4096}, "4096 devices are asked for"),
    ],
)
def test_a_split_that_cannot_be_is_refused_before_anything_is_loaded(split, message):
    with pytest.raises(ConfigError, match=message):
        serve(**split)
