"""Every family is served in bfloat16 on CPU: XLA lacks some of its products, and says so late."""

from __future__ import annotations

import pytest

from jaxserve import SamplingParams
from jaxserve.testing import FAMILIES, write_checkpoint
from kernels_pallas import cpu
from tests.jaxserve.engine.engines import serve
from tests.sparing import sparing

FEW = {"max_num_seqs": 2, "max_num_batched_tokens": 16, "dtype": "bfloat16"}


@pytest.mark.skipif(not cpu.available(), reason="no C++ compiler")
@pytest.mark.parametrize("model_type", sparing(FAMILIES, "deepseek_v3"))
def test_bfloat16_is_served(tmp_path, model_type):
    folder = write_checkpoint(tmp_path, model_type, tokenizer=False, dtype="bfloat16")
    with serve(folder, tokenizer=False, **FEW) as llm:
        out = llm.generate(
            [{"prompt_token_ids": [*range(5, 25)]}, {"prompt_token_ids": [7]}],
            SamplingParams(max_tokens=3, temperature=0, ignore_eos=True),
        )
    assert [len(o.outputs[0].token_ids) for o in out] == [3, 3]
