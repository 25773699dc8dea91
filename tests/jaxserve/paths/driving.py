"""Searches by hand, on a real engine."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from jaxserve import LLM
from jaxserve.paths.pool import EnginePool

PROMPT = "12 9 2 4 5 :"


def drive(llm: LLM, work: Callable[[EnginePool], Coroutine[Any, Any, Any]]) -> Any:
    """Runs a search, which closes its queries; then no page is held and nothing was compiled."""

    async def run() -> Any:
        pool = llm.searches.pool()
        try:
            return await work(pool)
        except BaseException:  # so that tests to come find an engine without rows
            for query in list(pool._queries):
                pool.close(query)
            raise

    before = llm.stats()
    found = asyncio.run(run())
    assert llm.drain(10)
    after = llm.stats()
    assert after.num_free_pages == after.num_pages
    assert after.compiles_after_warmup == before.compiles_after_warmup
    return found


def ids(llm: LLM, text: str = PROMPT, special: bool = True) -> list[int]:
    assert llm.tokenizer is not None
    return llm.tokenizer.encode(text, add_special_tokens=special)
