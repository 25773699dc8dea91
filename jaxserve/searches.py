"""Searches on a running engine: from prompts and a controller to results.

Every call has a thread and an event loop of its own, so a controller that never returns holds up
its own caller and nobody else, until it is broken off (`reasoning.watchdog`). Searches of one call
share a pool and a coordinator.
"""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import Callable, Coroutine, Hashable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, TypeVar

import msgspec

from jaxserve.engine.loop import EngineLoop
from jaxserve.errors import RequestError
from jaxserve.intake import Intake, Prompt, as_prompts
from jaxserve.paths.keeper import Keeper
from jaxserve.paths.pool import EnginePool
from jaxserve.paths.scorers import OtherModel, ScoreOf, Scorer, SelfEvaluation
from jaxserve.protocol import Cancelled, Event, Question
from jaxserve.request import Asked, RouteNoise, SamplingParams, check_ids
from reasoning.controllers import CONTROLLERS
from reasoning.pool import run_pool
from reasoning.questions import last_answer
from reasoning.result import Budget, Result
from reasoning.search import run_search
from reasoning.speculation import Coordinator, Speculator, Trust

T = TypeVar("T")


class Running:
    """Searches under way, from `begin` on, on a thread and an event loop of their own."""

    def __init__(self, work: Coroutine[Any, Any, list[Any]]):
        self._found: Future[list[Any]] = Future()
        self._found.set_running_or_notify_cancel()  # whoever waits for it cannot cancel it
        self._loop = asyncio.new_event_loop()
        self._task = self._loop.create_task(work)
        self._thread = threading.Thread(target=self._serve, name="jaxserve-search", daemon=True)

    def begin(self) -> Running:
        """Starts them; once. An interrupt that comes meanwhile cancels them: the thread may be on
        its way, and nobody could end it any more."""
        try:
            self._thread.start()
        except BaseException:
            self.cancel()
            raise
        return self

    def result(self, timeout: float | None = None) -> list[Any]:
        """Waits for the end; raises what the searches failed with, `Cancelled` after `cancel`."""
        return self._found.result(timeout)

    async def aresult(self) -> list[Any]:
        """`result` for an event loop. Cancelling this wait does not cancel the searches."""
        return await asyncio.wrap_future(self._found)

    @property
    def over(self) -> bool:
        return self._found.done()

    def when_over(self, tell: Callable[[], None]) -> None:
        """Calls `tell` when they have ended, on their thread; at once if they have."""
        self._found.add_done_callback(lambda _: tell())

    def cancel(self) -> None:
        """Has them end as soon as their controller lets them, or has been deciding for too long
        (`Budget.decision`); their pages go back. Thread-safe.

        Does nothing to searches that have ended.
        """
        with suppress(RuntimeError):  # their loop is closed
            self._loop.call_soon_threadsafe(self._task.cancel)

    def _serve(self) -> None:
        try:
            found = self._loop.run_until_complete(self._task)
        except asyncio.CancelledError:
            self._end(Cancelled("the search was cancelled"))
        except BaseException as error:
            self._end(error)
        else:
            self._end(found)

    def _end(self, found: list[Any] | BaseException) -> None:
        self._loop.close()
        if isinstance(found, BaseException):
            self._found.set_exception(found)
        else:
            self._found.set_result(found)


@dataclass(frozen=True)
class Searches:
    """What searches need of an engine.

    Attributes:
        prior: log-odds of the reward head before a path's first token; None: there is no head.
        scorers: by name, besides those that every pool has; more may be put in at any time.
    """

    loop: EngineLoop
    keeper: Keeper
    intake: Intake
    prior: float | None
    scorers: dict[str, ScoreOf | Scorer] = field(default_factory=dict[str, Any])
    trust: Trust = field(default_factory=Trust)  # in guesses, learned from all searches

    def search(
        self,
        prompts: Prompt | Question | Sequence[Prompt | Question],
        controller: Any,
        budget: Budget | None = None,
        *,
        read: Callable[[str], Hashable | None] = last_answer,
        step: str | Sequence[int] | None = None,
        max_tokens: int | None = None,
        seed: int = 0,
        **options: Any,
    ) -> Any:
        """See `LLM.search`. An interrupt cancels it.

        Args:
            read: from a path's text to its answer; by default what is boxed, or the last number.
            step: what closes a step: a text that is one token, or the ids of several; None: an
                empty line, for controllers that need steps.
            max_tokens: most tokens of a path.
            seed: of everything that is drawn.
            options: as of `start`.

        Raises:
            RequestError: a prompt or a setting cannot be honoured.
            SearchError: the controller failed.
        """
        many: list[Any] = [prompts] if isinstance(prompts, Question) else as_prompts(prompts)  # type: ignore[arg-type]

        def asked(prompt: Any) -> Question:
            if isinstance(prompt, Question):
                return prompt
            closes = self.step_tokens(step, controller)
            return self.question(prompt, read, closes, max_tokens, seed)

        found = self.run([asked(p) for p in many], controller, budget, **options)
        return found[0] if len(many) == 1 and many[0] is prompts else found

    def step_tokens(self, step: str | Sequence[int] | None, controller: Any) -> tuple[int, ...]:
        """The tokens that close a step.

        Raises:
            RequestError: a text is not one token, which a policy of trees cannot do without.
        """
        if step is not None and not isinstance(step, str):
            return tuple(step)
        text = "\n\n" if step is None else step
        closes = self.intake.tokenizer.encode(text, add_special_tokens=False)
        if len(closes) == 1:
            return tuple(closes)
        if step is None and not hasattr(controller, "ready"):
            return ()
        raise RequestError(
            f"step={text!r} is {len(closes)} tokens of this model, and must be one; give the "
            "ids of tokens that close a step",
            "step",
        )

    def question(
        self,
        prompt: Prompt,
        read: Callable[[str], Hashable | None] = last_answer,
        step: Sequence[int] = (),
        max_tokens: int | None = None,
        seed: int = 0,
    ) -> Question:
        """A prompt as a controller is given it.

        Raises:
            RequestError: the prompt and a path do not fit into the context.
        """
        words = self.intake.tokenizer
        ids, _ = self.intake.token_ids(prompt)
        self.intake.check(ids, SamplingParams(max_tokens=max_tokens))

        def answer(tokens: Sequence[int]) -> Hashable | None:
            return read(words.decode(tokens))

        length = self.keeper.max_model_len - len(ids) if max_tokens is None else max_tokens
        return Question(tuple(ids), answer, tuple(step), length, seed, words.decode)

    def run(
        self, questions: Sequence[Question], controller: Any, *args: Any, **kw: Any
    ) -> list[Any]:
        """`start`, and waits for the results; an interrupt cancels the searches."""
        running = self.prepare(questions, controller, *args, **kw)
        try:
            return running.begin().result()
        except BaseException:
            running.cancel()
            raise

    def start(
        self, questions: Sequence[Question], controller: Any, *args: Any, **kw: Any
    ) -> Running:
        """Begins searches for the answers of all questions; as `prepare`, and returns at once."""
        return self.prepare(questions, controller, *args, **kw).begin()

    def prepare(
        self,
        questions: Sequence[Question],
        controller: Any,
        budget: Budget | None = None,
        *,
        spec: Speculator | None = None,
        scorer: str | Scorer | Asked | Any = None,
        on_event: Callable[[Event], None] | None = None,
        return_exceptions: bool = False,
    ) -> Running:
        """Searches for the answers of all questions, ready to begin.

        Args:
            controller: a `SearchPolicy` or a `PoolPolicy`; one serves all questions.
            spec: how a tree search runs ahead of itself.
            scorer: of paths: a name, a `Scorer`, what the model is `Asked` about its own reasoning,
                or another `LLM` with a reward head; None: the reward head, or confidence where
                there is none, and nobody for a controller that does not look at scores.
            on_event: is told what happens, on another thread.
            return_exceptions: errors stand in the place of results; otherwise the first is raised.

        Raises:
            RequestError: the controller is none, a setting does not go with it, or an id is no
                token.
        """
        _check(controller, spec)
        looks = hasattr(controller, "ready") or getattr(controller, "scored", True)
        name, scorers = self._scorer(scorer) if looks or scorer is not None else (None, {})
        for setting, route in routes_of(controller).items():
            if why := self.keeper.cannot_refine(route):
                raise RequestError(why, f"settings.{setting}")
        vocab = self.intake.vocab
        for question in questions:
            check_ids("the prompt", question.prompt, vocab, "prompt")
            check_ids("what closes a step", question.step, vocab, "step")
        check_ids("the suffix of a probe", getattr(controller, "suffix", ()), vocab, "suffix")

        async def all_of_them() -> list[Any]:
            pool = self.pool(on_event, scorers, judged=name == "prm")
            coordinator = Coordinator(trust=self.trust)
            searches = [
                self._one(controller, pool, question, budget, spec, name, coordinator)
                for question in questions
            ]
            return await _together(searches, return_exceptions)

        return Running(all_of_them())

    def _scorer(self, asked: Any) -> tuple[str, dict[str, ScoreOf | Scorer]]:
        """The name of a scorer, and all that there are."""
        usual = "confidence" if self.prior is None else "prm"
        if asked == SelfEvaluation.name and asked not in self.scorers:
            asked = Asked()
        if isinstance(asked, Asked):
            encode = partial(self.intake.tokenizer.encode, add_special_tokens=False)
            asked = SelfEvaluation.asking(asked, encode)
        if asked is None or isinstance(asked, str):
            own = ["confidence", usual, "certainty", SelfEvaluation.name]
            known = dict.fromkeys([*own, *self.scorers])
            if asked is not None and asked not in known:
                raise RequestError(
                    f"scorer={asked!r} is not known to this model; it has {', '.join(known)}",
                    "scorer",
                )
            return asked or usual, self.scorers
        if isinstance(other := getattr(asked, "searches", None), Searches):
            asked = other.as_scorer(self)
        if not hasattr(asked, "session"):
            raise RequestError(
                f"scorer={asked!r} is neither a name nor a Scorer nor an LLM", "scorer"
            )
        return asked.name, {**self.scorers, asked.name: asked}

    def as_scorer(self, of: Searches, *, latency: float = 0.0) -> OtherModel:
        """This model's reward head as a scorer of another one's paths.

        Args:
            latency: seconds that a batch of scores takes longer than it must.

        Raises:
            RequestError: there is no reward head.
        """
        if self.prior is None:
            raise RequestError(
                "scorer: that model has no reward head; load one with reward_head=FILE", "scorer"
            )
        ours, theirs = self.intake.tokenizer, of.intake.tokenizer

        def translate(tokens: Sequence[int]) -> Sequence[int]:
            return ours.encode(theirs.decode(tokens))

        same = ours.has_words_of(theirs)
        return OtherModel(self.pool, None if same else translate, latency)

    def _one(
        self,
        controller: Any,
        pool: EnginePool,
        question: Question,
        budget: Budget | None,
        spec: Speculator | None,
        scorer: str | None,
        coordinator: Coordinator,
    ) -> Coroutine[Any, Any, Result]:
        if not hasattr(controller, "ready"):
            return run_pool(controller, pool, question, budget or Budget(), scorer=scorer)
        assert scorer is not None, "trees are looked at by their scores"
        return run_search(
            controller, pool, question, budget, spec=spec, scorer=scorer, coordinator=coordinator
        )

    def pool(
        self,
        on_event: Callable[[Event], None] | None = None,
        scorers: Mapping[str, ScoreOf | Scorer] | None = None,
        *,
        judged: bool = True,
    ) -> EnginePool:
        """Paths of the running event loop; arguments are those of `EnginePool`."""
        words, prior = self.intake.tokenizer, self.prior or 0.0
        return EnginePool(
            self.loop, self.keeper, words.eos_token_ids, prior,
            self.scorers if scorers is None else scorers, on_event,
            vocab=self.intake.vocab, decode=words.decode, judged=judged,
        )  # fmt: skip


async def _together(searches: Sequence[Coroutine[Any, Any, T]], keep_errors: bool) -> list[Any]:
    """All results; after the first error, unless errors are kept, the rest is cancelled."""
    tasks = [asyncio.ensure_future(search) for search in searches]
    try:
        return await asyncio.gather(*tasks, return_exceptions=keep_errors)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def controller_of(name: str, settings: Mapping[str, Any] | None = None) -> Any:
    """A controller by its name, with settings as JSON says them, checked against their types.

    Raises:
        RequestError: there is none of that name, or it has no such setting or value.
    """
    if name not in CONTROLLERS:
        raise RequestError(
            f"controller {name!r} is not known; there are {', '.join(CONTROLLERS)}", "controller"
        )
    kind, given = CONTROLLERS[name], dict(settings or {})
    try:
        made = msgspec.convert(given, kind)
    except msgspec.ValidationError as error:
        what, _, where = str(error).partition(" - at `$")
        path = f"settings{where.rstrip('`')}"
        raise RequestError(f"{name}: {path}: {what}", path) from None
    _refuse_unknown(name, given, made)
    return made


def _refuse_unknown(name: str, given: Mapping[str, Any], made: Any, path: str = "settings") -> None:
    """Refuses keys that no dataclass has a field for, however deep they lie."""
    fields = [field.name for field in dataclasses.fields(made)]
    for key, value in given.items():
        if key not in fields:
            raise RequestError(
                f"{name} has no setting {key!r} in {path}; it has {', '.join(fields)}",
                f"{path}.{key}",
            )
        if isinstance(value, Mapping) and dataclasses.is_dataclass(inner := getattr(made, key)):
            _refuse_unknown(name, value, inner, f"{path}.{key}")


def routes_of(controller: Any) -> dict[str, RouteNoise]:
    """How a controller has tokens refined, by the setting that says so; none if it never does."""
    asked = {"route": getattr(controller, "route", None)}
    asked["gen"] = getattr(getattr(controller, "gen", None), "route", None)
    return {name: route for name, route in asked.items() if isinstance(route, RouteNoise)}


def _check(controller: Any, spec: Speculator | None) -> None:
    if not hasattr(controller, "ready") and not hasattr(controller, "step"):
        raise RequestError(
            f"{controller!r} is no controller: it has neither `ready` (trees) nor `step`",
            "controller",
        )
    if spec is not None and not hasattr(controller, "ready"):
        raise RequestError(
            f"speculation is for searches of trees; {controller.name} grows a pool", "spec"
        )


class once(cached_property[T]):
    """A cached property that threads which ask at the same time make only once."""

    def __init__(self, make: Callable[[Any], T]):
        super().__init__(make)
        self._making = threading.RLock()

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        with self._making:
            return super().__get__(instance, owner)
