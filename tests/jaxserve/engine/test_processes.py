"""Two processes of four CPU devices each say together what one device says."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.jaxserve.engine.engines import checkpoint
from tests.jaxserve.engine.test_mesh import alone
from tests.sharding.test_multihost import run

SERVE = """
import json
from tests.jaxserve.engine.engines import serve
from tests.jaxserve.engine.test_mesh import said

llm = serve(sys.argv[1], forbid_compile=True, **json.loads(sys.argv[2]))
if llm.follows:
    llm.follow()
"""
SAY = """
else:
    print("said", json.dumps(said(llm)))
stats = llm.stats()
assert stats.num_free_pages == stats.num_pages > 0 and stats.compiles_after_warmup == 0
assert sum(stats.requests_total.values()) == 9, stats
llm.shutdown()
print("ended")
"""

SPLITS = [
    ("qwen3", {"tensor_parallel_size": 4, "data_parallel_size": 2}),
    ("qwen3_moe", {"expert_parallel_size": 8, "num_redundant_experts": 8}),
    ("qwen3", {"tensor_parallel_size": 2, "data_parallel_size": 4}),
]


def said(output: str) -> Any:
    """What was said, beside what gloo prints."""
    (line,) = (line for line in output.splitlines() if line.startswith("said "))
    return json.loads(line.removeprefix("said "))


@pytest.mark.slow
@pytest.mark.parametrize(("model_type", "split"), SPLITS)
def test_processes_say_what_one_device_says(model_type: str, split: dict[str, Any]):
    leader, follower = run(SERVE + SAY, str(checkpoint(model_type)), json.dumps(split))
    assert said(leader) == alone(model_type)
    assert leader.splitlines()[-1] == follower.splitlines()[-1] == "ended"
