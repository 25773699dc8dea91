"""Small engines over tiny checkpoints: served whole, or stepped by hand."""

from __future__ import annotations

import functools
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from jaxserve import LLM, SamplingParams
from jaxserve.cache.page_manager import PageManager
from jaxserve.engine.engine import Engine
from jaxserve.engine.generation import Generation
from jaxserve.engine.runner import Runner
from jaxserve.testing import write_checkpoint
from tests.jaxserve.engine.fake_runner import Watched

SETTINGS: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 128,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 16,
    "page_size": 8,
    "background_compile": False,
    "progress": False,
}


@functools.cache
def checkpoint(model_type: str = "qwen3") -> Path:
    """A tiny checkpoint with a tokenizer, written once."""
    import atexit

    folder = Path(tempfile.mkdtemp(prefix="jaxserve-engine-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return write_checkpoint(folder / model_type, model_type)


def serve(folder: Path | None = None, **settings: Any) -> LLM:
    """A served model of few and small programs."""
    return LLM(folder or checkpoint(), **{**SETTINGS, **settings})


def dawdle(llm: LLM, monkeypatch: Any, seconds: float = 0.02) -> LLM:
    """The same model at so many seconds a step, so that there is time to interfere."""
    launch = llm._runner.launch

    def launch_slowly(step: Any) -> Any:
        time.sleep(seconds)
        return launch(step)

    monkeypatch.setattr(llm._runner, "launch", launch_slowly)
    return llm


class Limited:
    """A runner that takes smaller steps than it could."""

    def __init__(self, runner: Runner, max_tokens: int):
        self._runner = runner
        tokens, rows = runner.limits
        tokens = min(max_tokens, tokens)
        self.limits = tokens, min(rows, runner.plan.rows(tokens))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)


class Driver:
    """An engine of its own over a served model's programs, stepped by hand: no thread, no clock.

    Chunks, sequences and the pool may be smaller than the model's own; nothing is compiled.
    """

    def __init__(
        self,
        llm: LLM,
        *,
        budget: int | None = None,
        num_pages: int | None = None,
        max_num_seqs: int | None = None,
        prefix_caching: bool = True,
    ):
        self._llm, plan = llm, llm.plan
        runner: Any = Limited(llm._runner, budget or plan.max_num_batched_tokens)
        text = llm.tokenizer.token_text if llm.tokenizer else str
        self.engine = Engine(runner, prefix_caching=prefix_caching, token_text=text)
        seqs = min(max_num_seqs or plan.max_num_seqs, plan.max_num_seqs)
        self.engine.ranks = [
            Watched(
                PageManager(num_pages or plan.num_pages, plan.page_size),
                seqs,
                prefix_caching=prefix_caching,
            )
            for _ in self.engine.ranks
        ]

    def add(
        self, prompt: list[int], params: SamplingParams, pooling: str | None = None
    ) -> Generation:
        sequences = self._llm._intake.sequences(prompt, params, pooling=pooling)
        generation = sequences[0].generation
        generation._abort = self.engine.abort
        self.engine.add(sequences)
        return generation

    def step(self) -> None:
        if self.engine.has_work:
            self.engine.step()

    def run(self) -> None:
        """Steps until nothing is left to do."""
        while self.engine.has_work:
            self.engine.step()
        for rank in self.engine.ranks:
            assert rank.pages.num_free == rank.pages.num_pages, "a page leaked"
