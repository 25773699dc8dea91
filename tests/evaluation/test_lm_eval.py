"""lm-eval runs local tasks against the server and finds what the engine itself says.

Needs the extra `eval` (68 packages), which `make test` does not install: `make eval` runs this.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from jaxserve import LLM, SamplingParams
from jaxserve.testing import write_checkpoint
from tests.jaxserve.server.live_server import LiveServer

pytest.importorskip("lm_eval", reason="lm-eval is in the extra `eval`; `make eval` installs it")

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LiveServer, Path]]:
    folder = write_checkpoint(tmp_path_factory.mktemp("eval") / "tiny", "qwen3")
    llm = LLM(folder, max_model_len=512, progress=False)
    llm.wait_until_warm()
    with LiveServer(llm, served_model_name="tiny") as server:
        yield server, folder


def evaluate(task: str, model: str, path: str, served: tuple[LiveServer, Path], out: Path) -> dict:
    """Metrics of one lm-eval run, in a process of its own."""
    server, folder = served
    tasks = out / "tasks"
    tasks.mkdir()
    for source in HERE.glob("*.yaml"):
        (tasks / source.name).write_text(source.read_text().replace("${FOLDER}", str(HERE)))
    arguments = {
        "model": "tiny",
        "base_url": f"{server.url}{path}",
        "num_concurrent": 4,
        "tokenizer": folder,
        "tokenizer_backend": "huggingface",
    }
    command = [sys.executable, "-m", "lm_eval", "--model", model, "--tasks", task]
    command += ["--model_args", ",".join(f"{k}={v}" for k, v in arguments.items())]
    command += ["--include_path", str(tasks), "--output_path", str(out), "--log_samples"]
    command += ["--apply_chat_template"] if model == "local-chat-completions" else []
    environment = {**os.environ, "HF_HOME": str(out / "hf"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    (result,) = out.rglob("results_*.json")
    return json.loads(result.read_text())["results"][task]


def test_local_completions_score_what_the_engine_scores(
    served: tuple[LiveServer, Path], tmp_path: Path
) -> None:
    llm = served[0].llm
    rows = [json.loads(line) for line in (HERE / "choice.jsonl").read_text().splitlines()]

    def loglikelihood(question: str, choice: str) -> float:
        ids = llm.tokenizer.encode(question + choice)
        asked = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
        scores = llm.generate({"prompt_token_ids": ids}, asked)[0].prompt_logprobs
        start = len(llm.tokenizer.encode(question))
        return sum(s[t].logprob for s, t in zip(scores[start:], ids[start:], strict=True))

    hits = 0
    for row in rows:
        scores = [loglikelihood(row["question"], choice) for choice in row["choices"]]
        hits += scores.index(max(scores)) == row["answer"]
    found = evaluate("jaxserve_choice", "local-completions", "/v1/completions", served, tmp_path)
    assert found["acc,none"] == pytest.approx(hits / len(rows))


def test_local_chat_completions_generate(served: tuple[LiveServer, Path], tmp_path: Path) -> None:
    path = "/v1/chat/completions"
    before = served[0].llm.stats().generation_tokens_total
    found = evaluate("jaxserve_write", "local-chat-completions", path, served, tmp_path)
    assert 0 <= found["exact_match,none"] <= 1
    assert served[0].llm.stats().generation_tokens_total > before
