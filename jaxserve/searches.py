"""Searches on a running engine: from prompts and a controller to results.

Every call has a thread and an event loop of its own, so a controller that never returns holds up
its own caller and nobody else. Searches of one call share a pool and a coordinator.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Callable, Coroutine, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

from jaxserve.engine.loop import EngineLoop
from jaxserve.errors import RequestError
from jaxserve.intake import Intake, Prompt, as_prompts
from jaxserve.paths.keeper import Keeper
from jaxserve.paths.pool import EnginePool, ScoreOf
from jaxserve.protocol import Event, Question
from reasoning.pool import run_pool
from reasoning.questions import last_answer
from reasoning.result import Budget, Result
from reasoning.search import run_search
from reasoning.speculation import Coordinator, Speculator

T = TypeVar("T")

_queries = itertools.count()


@dataclass(frozen=True)
class Searches:
    """What searches need of an engine.

    Attributes:
        prior: log-odds of the reward head before a path's first token; None: there is no head.
        scorers: by name, besides "prm" and "confidence"; more may be put in at any time.
    """

    loop: EngineLoop
    keeper: Keeper
    intake: Intake
    prior: float | None
    scorers: dict[str, ScoreOf] = field(default_factory=dict[str, ScoreOf])

    def search(
        self,
        prompts: Prompt | Question | Sequence[Prompt | Question],
        controller: Any,
        budget: Budget | None = None,
        *,
        read: Callable[[str], Hashable | None] | None = None,
        step: str | Sequence[int] = "\n\n",
        max_tokens: int | None = None,
        seed: int = 0,
        **options: Any,
    ) -> Any:
        """See `LLM.search`.

        Args:
            read: from a path's text to its answer; None: what is boxed, or the last number.
            step: what closes a step: a text that is one token, or the ids of several.
            max_tokens: most tokens of a path.
            seed: of everything that is drawn.
            options: as of `run`.

        Raises:
            RequestError: a prompt or a setting cannot be honoured.
            SearchError: the controller failed.
        """
        many: list[Any] = [prompts] if isinstance(prompts, Question) else as_prompts(prompts)  # type: ignore[arg-type]

        def asked(prompt: Any) -> Question:
            if isinstance(prompt, Question):
                return prompt
            return self.question(prompt, read or last_answer, step, max_tokens, seed)

        found = self.run([asked(p) for p in many], controller, budget, **options)
        return found[0] if len(many) == 1 and many[0] is prompts else found

    def question(
        self,
        prompt: Prompt,
        read: Callable[[str], Hashable | None],
        step: str | Sequence[int],
        max_tokens: int | None,
        seed: int,
    ) -> Question:
        """A prompt as a controller is given it."""
        words = self.intake.tokenizer
        ids, _ = self.intake.token_ids(prompt)
        closes = words.encode(step, add_special_tokens=False) if isinstance(step, str) else step
        if isinstance(step, str) and len(closes) != 1:
            raise RequestError(
                f"step={step!r} is {len(closes)} tokens of this model, and must be one; give the "
                "ids of tokens that close a step",
                "step",
            )

        def answer(tokens: Sequence[int]) -> Hashable | None:
            return read(words.decode(tokens))

        length = self.keeper.max_model_len - len(ids) if max_tokens is None else max_tokens
        return Question(tuple(ids), answer, tuple(closes), length, seed, words.decode)

    def run(
        self,
        questions: Sequence[Question],
        controller: Any,
        budget: Budget | None = None,
        *,
        spec: Speculator | None = None,
        scorer: str | None = None,
        on_event: Callable[[Event], None] | None = None,
        return_exceptions: bool = False,
    ) -> list[Any]:
        """Searches for the answers of all questions at once.

        Args:
            controller: a `SearchPolicy` or a `PoolPolicy`; one serves all questions.
            spec: how a tree search runs ahead of itself.
            scorer: of paths; None: the reward head, or confidence where there is none.
            on_event: is told what happens, on another thread.
            return_exceptions: errors stand in the place of results; otherwise the first is raised.
        """
        scorer = scorer or ("confidence" if self.prior is None else "prm")

        async def all_of_them() -> list[Any]:
            pool = self.pool(on_event)
            coordinator = Coordinator()
            searches = [
                self._one(controller, pool, question, budget, spec, scorer, coordinator)
                for question in questions
            ]
            return await _together(searches, return_exceptions)

        return _in_thread(all_of_them())

    def _one(
        self,
        controller: Any,
        pool: EnginePool,
        question: Question,
        budget: Budget | None,
        spec: Speculator | None,
        scorer: str,
        coordinator: Coordinator,
    ) -> Coroutine[Any, Any, Result]:
        query = next(_queries)
        if hasattr(controller, "ready"):
            return run_search(
                controller, pool, question, budget, spec=spec, scorer=scorer,
                coordinator=coordinator, query=query,
            )  # fmt: skip
        if not hasattr(controller, "step"):
            raise RequestError(
                f"{controller!r} is no controller: it has neither `ready` (trees) nor `step`",
                "controller",
            )
        if spec is not None:
            raise RequestError(
                f"speculation is for searches of trees; {controller.name} grows a pool", "spec"
            )
        return run_pool(controller, pool, question, budget or Budget(), scorer=scorer, query=query)

    def pool(self, on_event: Callable[[Event], None] | None = None) -> EnginePool:
        """Paths of the running event loop."""
        eos_ids, prior = self.intake.tokenizer.eos_token_ids, self.prior or 0.0
        return EnginePool(self.loop, self.keeper, eos_ids, prior, self.scorers, on_event)


async def _together(searches: Sequence[Coroutine[Any, Any, T]], keep_errors: bool) -> list[Any]:
    """All results; after the first error, unless errors are kept, the rest is cancelled."""
    tasks = [asyncio.ensure_future(search) for search in searches]
    try:
        return await asyncio.gather(*tasks, return_exceptions=keep_errors)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _in_thread(work: Coroutine[Any, Any, T]) -> T:
    """Runs a coroutine to its end on a loop of its own; an interrupt cancels it first.

    The calling thread may have a loop already, as notebooks do.
    """
    found: Future[T] = Future()
    task: asyncio.Task[T] | None = None
    loop = asyncio.new_event_loop()

    async def run() -> None:
        nonlocal task
        task = asyncio.ensure_future(work)
        try:
            found.set_result(await task)
        except BaseException as error:
            found.set_exception(error)

    def serve() -> None:
        try:
            loop.run_until_complete(run())
        finally:
            loop.close()

    thread = threading.Thread(target=serve, name="jaxserve-search", daemon=True)
    thread.start()
    try:
        return found.result()
    except BaseException:
        if task is not None and not found.done():
            loop.call_soon_threadsafe(task.cancel)
        raise
