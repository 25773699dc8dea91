"""Two processes of four CPU devices each say together what one device says."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.jaxserve.engine.engines import checkpoint
from tests.jaxserve.engine.test_mesh import alone
from tests.sharding.test_multihost import free_port, run

ROOT = Path(__file__).parents[3]

SERVE = """
import json, signal, threading
from pathlib import Path
import pytest
from jaxserve import SamplingParams
from jaxserve.errors import EngineError, RequestError
from tests.jaxserve.engine.engines import serve
from tests.jaxserve.engine.test_mesh import said

def start(**more):
    asked = {"max_num_seqs": 4, "forbid_compile": True, "num_pages": 64}
    return serve(Path(sys.argv[1]), **asked | json.loads(sys.argv[2]) | more)
"""
SAY = """
with start(background_compile=True) as llm:
    if llm.follows:
        with pytest.raises(EngineError, match=r"process 1 follows process 0.*call follow\\(\\)"):
            llm.generate([5])
        llm.follow()
    else:
        with pytest.raises(EngineError, match="process 0 takes the requests"):
            llm.follow()
        print("said", json.dumps(said(llm)))
        if llm.plan.dispatch:
            assert llm.rebalance_experts() > 0 and not llm.expert_load().any()
        llm.reset_prefix_cache()
        print("said", json.dumps(said(llm)))
        with pytest.raises(RequestError, match="embedding needs one process, and 2 serve"):
            llm.embed([[5, 6]])
        with pytest.raises(RequestError, match="prompt_logprobs needs one process"):
            llm.generate([5], SamplingParams(prompt_logprobs=1))
        for refused in (llm.sleep, lambda: llm.load_params(llm.params)):
            with pytest.raises(EngineError, match="needs one process, and 2 serve together"):
                refused()
    stats = llm.stats()
assert stats.num_free_pages == stats.num_pages > 0 and stats.compiles_after_warmup == 0
assert sum(stats.requests_total.values()) == 2 * 9, stats
print("ended")
"""

SPLITS = [
    ("qwen3", {"tensor_parallel_size": 4, "data_parallel_size": 2}),
    ("qwen3_moe", {"expert_parallel_size": 8, "num_redundant_experts": 8}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("model_type", "split"), SPLITS)
def test_processes_say_what_one_device_says(model_type: str, split: dict[str, Any]):
    leader, follower = run(SERVE + SAY, str(checkpoint(model_type)), json.dumps(split))
    lines = [line for line in leader.splitlines() if line.startswith("said ")]  # gloo prints too
    assert [json.loads(line.removeprefix("said ")) for line in lines] == 2 * [alone(model_type)]
    assert leader.splitlines()[-1] == follower.splitlines()[-1] == "ended"


LOSE = """
llm = start()
if llm.follows:
    threading.Timer(2, os.kill, [os.getpid(), signal.SIGKILL]).start()
    llm.follow()
try:
    while True:
        llm.generate([[5, 6, 7]] * 4, SamplingParams(max_tokens=100, ignore_eos=True))
except EngineError as error:
    print("told:", error)
try:
    llm.generate([5])
except EngineError as error:
    print("then:", error)
llm.shutdown()
"""


@pytest.mark.slow
def test_requests_are_told_which_process_is_gone():
    split = {"tensor_parallel_size": 4, "data_parallel_size": 2}
    codes = (0, -signal.SIGKILL)
    leader, _ = run(SERVE + LOSE, str(checkpoint()), json.dumps(split), codes=codes)
    assert "told: process 1 of the mesh is gone" in leader
    assert "then: process 1 of the mesh is gone" in leader


@pytest.mark.slow
def test_one_command_in_each_process_serves(tmp_path: Path):
    port, options = free_port(), "--tp 2 --dp 4 --max-num-seqs 4 --num-pages 64 --no-progress"
    options += f" --port {port} --num-processes 2 --coordinator 127.0.0.1:{free_port()}"
    command = [sys.executable, "-m", "jaxserve.cli", "serve", str(checkpoint()), *options.split()]
    logs = [(tmp_path / f"{i}.log").open("w+") for i in range(2)]
    processes = [
        subprocess.Popen([*command, "--process-id", str(i)], cwd=ROOT, stdout=log, stderr=log)
        for i, log in enumerate(logs)
    ]
    try:
        while "serving" not in (said := Path(logs[0].name).read_text()):
            assert processes[0].poll() is processes[1].poll() is None, said
            time.sleep(0.2)
        answer = httpx.post(
            f"http://127.0.0.1:{port}/v1/completions",
            json={"model": str(checkpoint()), "prompt": [5, 6, 7], "max_tokens": 4},
            timeout=60,
        )
        assert answer.json()["usage"]["completion_tokens"] == 4, answer.text
        os.kill(processes[0].pid, signal.SIGTERM)
        assert [p.wait(60) for p in processes] == [0, 0], Path(logs[1].name).read_text()
    finally:
        for process, log in zip(processes, logs, strict=True):
            process.kill()
            log.close()


def test_half_of_what_processes_need_is_refused(capsys: pytest.CaptureFixture[str]):
    from jaxserve.cli import main

    assert main(["generate", "m", "hi", "--coordinator", "127.0.0.1:1"]) == 1
    said = capsys.readouterr().err
    assert "JAX_NUM_PROCESSES, JAX_PROCESS_ID missing" in said and "give all or none" in said
