"""Every family says what transformers says, through the whole engine.

All prompts are served at once, in steps of few tokens, on pages of eight; then once more, behind
what is cached of them.
"""

from __future__ import annotations

import numpy as np
import pytest

from jaxserve import SamplingParams
from jaxserve.request import RequestOutput, TokenLogprobs
from kernels_pallas import cpu
from tests.jaxserve.engine.engines import serve
from tests.jaxserve.models import hf_cases
from tests.jaxserve.models.hf_cases import CASES, FAMILIES

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("default")  # torch's and transformers' own

TOLERANCE = 2e-3
OUTPUT = 10
NATIVE = pytest.mark.skipif(not cpu.available(), reason="no C++ compiler")

QUICK = ("gemma3_text", "qwen3_moe", "deepseek_v3")


def cases() -> list[pytest.ParameterSet]:
    """Every case on both kernels; each family's first, in small steps, on those that are served."""
    served = "native" if cpu.available() else "reference"
    out = []
    for name in CASES:
        for kernels in ("native", "reference"):
            marks = [NATIVE] if kernels == "native" else []
            steps = 8 if name in FAMILIES and kernels == served else 32
            if steps > 8 or name not in QUICK:  # more programs, and more to compile in each
                marks.append(pytest.mark.slow)
            out.append(pytest.param(name, kernels, steps, marks=marks, id=f"{name}-{kernels}"))
    return out


def prompts() -> list[list[int]]:
    rng = np.random.default_rng(0)
    drawn = [rng.integers(2, hf_cases.VOCAB, n).tolist() for n in (1, 5, 9, 40)]
    return [*drawn, [*drawn[3][:20], *drawn[1]]]


def generated(name: str, prompt: list[int]) -> list[int]:
    """What transformers' own greedy search says."""
    import torch
    from transformers import GenerationConfig

    model = hf_cases.reference(name)
    model.generation_config.eos_token_id = None  # it would fill in what the request leaves out
    asked = GenerationConfig(do_sample=False, max_new_tokens=OUTPUT, pad_token_id=0)
    with torch.no_grad():
        ids = model.generate(torch.tensor([prompt]), generation_config=asked)
    return ids[0, len(prompt) :].tolist()


def log_probabilities(name: str, tokens: list[int]) -> np.ndarray:
    logits = hf_cases.logits(name, np.array([tokens]))[0].astype(np.float64)
    total = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
    return logits - logits.max(-1, keepdims=True) - total


def assert_scored(found: list[TokenLogprobs], want: np.ndarray, tokens: list[int]) -> None:
    """Each token's log-probability, and that of each alternative beside it, is the wanted one."""
    for entry, row, token in zip(found, want, tokens, strict=True):
        assert next(iter(entry)) == token
        for other, logprob in entry.items():
            assert abs(logprob.logprob - row[other]) < TOLERANCE
        assert abs(entry[token].rank - (1 + (row > row[token]).sum())) <= (
            (np.abs(row - row[token]) < TOLERANCE).sum() - 1
        )


def assert_equal(name: str, prompt: list[int], out: RequestOutput, scored: bool) -> None:
    tokens = out.outputs[0].token_ids
    assert tokens == generated(name, prompt)
    want = log_probabilities(name, prompt + tokens)
    assert out.outputs[0].logprobs is not None
    assert_scored(out.outputs[0].logprobs, want[len(prompt) - 1 : -1], tokens)
    if scored:
        assert out.prompt_logprobs is not None
        first, *rest = out.prompt_logprobs
        assert first is None
        assert_scored(rest, want[: len(prompt) - 1], prompt[1:])  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "kernels", "steps"), cases())
def test_tokens_and_logprobs_are_transformers(name: str, kernels: str, steps: int):
    asked = prompts()
    settings = {"kernels": kernels, "max_num_batched_tokens": steps, "max_num_seqs": len(asked)}
    greedy = {"temperature": 0.0, "max_tokens": OUTPUT, "ignore_eos": True, "logprobs": 3}
    with serve(hf_cases.checkpoint(name), **settings, forbid_compile=True) as llm:
        for out, prompt in zip(
            llm.generate(asked, SamplingParams(**greedy, prompt_logprobs=2)), asked, strict=True
        ):
            assert_equal(name, prompt, out, scored=True)
        again = llm.generate(asked, SamplingParams(**greedy))
        for out, prompt in zip(again, asked, strict=True):
            assert out.num_cached_tokens == (len(prompt) - 1) // 8 * 8
            assert_equal(name, prompt, out, scored=False)
        stats = llm.stats()
        assert stats.num_free_pages == stats.num_pages
        assert stats.compiles_after_warmup == 0
