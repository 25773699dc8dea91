"""CONTRIBUTING's worked example: short, and equal to transformers through the real engine."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from jaxserve import LLM, SamplingParams
from jaxserve.models import family

FILE = Path(__file__).parents[2] / "examples" / "olmo2.py"


@pytest.fixture
def olmo2(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The example, in the place where CONTRIBUTING says to put it."""
    name = "jaxserve.models.olmo2"
    spec = importlib.util.spec_from_file_location(name, FILE)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(family, "FAMILIES", (*family.FAMILIES, "olmo2"))
    return module


def test_the_family_has_under_a_hundred_lines():
    assert len(FILE.read_text().splitlines()) < 100


@pytest.mark.filterwarnings("default")  # torch's and transformers' own
def test_it_equals_transformers(olmo2: ModuleType, tmp_path: Path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    hf = transformers.Olmo2ForCausalLM(transformers.Olmo2Config(
        vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )).float().eval()  # fmt: skip
    for name, value in hf.named_parameters():
        torch.nn.init.normal_(value, 1.0 if "norm" in name else 0.0, 0.2)
    hf.save_pretrained(tmp_path)

    prompts = np.random.default_rng(0).integers(0, 256, (3, 40))
    with torch.no_grad():
        want = hf.generate(torch.from_numpy(prompts), max_new_tokens=20, do_sample=False)
        scores = torch.log_softmax(hf(torch.from_numpy(prompts)).logits, -1).numpy()
    with LLM(tmp_path, tokenizer=False, dtype="float32", progress=False) as llm:
        asked = SamplingParams(temperature=0, max_tokens=20, prompt_logprobs=0)
        outputs = llm.generate(prompts.tolist(), asked)
    for row, output in enumerate(outputs):
        assert output.outputs[0].token_ids == want[row, 40:].tolist()
        found = [step[t].logprob for t, step in zip(
            output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)]  # fmt: skip
        expected = scores[row, np.arange(39), prompts[row, 1:]]
        np.testing.assert_allclose(found, expected, atol=2e-3)
