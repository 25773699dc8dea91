"""Who says how good a path is, besides the model's own reward head: another model, the model itself
when it is asked, or a program that knows.

A scorer is given paths in batches, and never the same text twice: `Batched` gathers what searches
ask for at the same time and remembers what was said.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
from array import array
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from jaxserve.errors import RequestError
from jaxserve.protocol import Gen, Node, SearchError
from jaxserve.request import Asked

if TYPE_CHECKING:
    from jaxserve.paths.pool import EnginePool

ScoreOf = Callable[["EnginePool", Node], Awaitable[float]]
"""What somebody thinks of a path, in [0, 1]."""


@dataclass(frozen=True)
class Said:
    """A path, as scorers are given it.

    Attributes:
        tokens: behind the prompt.
        decode: from tokens to text.
    """

    node: Node
    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    decode: Callable[[Sequence[int]], str] = field(compare=False)

    @cached_property
    def key(self) -> bytes:
        """Equal for equal texts behind equal prompts."""
        lead = array("q", [len(self.prompt), *self.prompt, *self.tokens]).tobytes()
        return hashlib.blake2b(lead, digest_size=16).digest()

    @property
    def text(self) -> str:
        return self.decode(self.tokens)


class Scorer(Protocol):
    """Scores paths of one search after another; any number of pools may share it.

    Attributes:
        name: what results and events call it.
        latency: seconds that a batch takes longer than it must. The wait for a score is what
            speculation hides, and is there only if a score costs something.
    """

    @property
    def name(self) -> str: ...

    @property
    def latency(self) -> float: ...

    def session(self, pool: EnginePool) -> Session:
        """What scores the paths of one pool, on its event loop."""
        ...


class Session(Protocol):
    def score_batch(self, paths: Sequence[Said]) -> Awaitable[Sequence[float]]:
        """What each path is worth, in [0, 1]."""
        ...

    def close(self, query: int) -> None:
        """Gives up what is kept for a query; of a query that never was, nothing is."""
        ...


class Batched:
    """A scorer as a pool asks it: node by node, at any time."""

    def __init__(self, scorer: Scorer, pool: EnginePool):
        self._name, self._latency = scorer.name, scorer.latency
        self._session = scorer.session(pool)
        self._answers: dict[bytes, asyncio.Future[float]] = {}
        self._asked: list[Said] = []
        self._batches = set[asyncio.Task[None]]()

    async def __call__(self, pool: EnginePool, n: Node) -> float:
        """See `EnginePool.score`. Who gives up waiting takes the answer from nobody else."""
        said = pool.said(n)
        answer = self._answers.get(said.key)
        if answer is None:
            answer = self._answers[said.key] = asyncio.get_running_loop().create_future()
            answer.add_done_callback(_looked_at)
            self._asked.append(said)
            if len(self._asked) == 1:
                asyncio.get_running_loop().call_soon(self._begin)
        return await asyncio.shield(answer)

    def _begin(self) -> None:
        """Everything that was asked for before the loop came round is one batch."""
        paths, self._asked = self._asked, []
        batch = asyncio.ensure_future(self._batch(paths))
        self._batches.add(batch)
        batch.add_done_callback(self._batches.discard)

    async def _batch(self, paths: list[Said]) -> None:
        try:
            await asyncio.sleep(self._latency)
            values = list(await self._session.score_batch(paths))
            if len(values) != len(paths) or not all(0 <= v <= 1 for v in values):
                raise SearchError(
                    f"scorer {self._name!r} said {values} of {len(paths)} paths; it must say one "
                    "number in [0, 1] of each"
                )
        except Exception as error:
            for said in paths:  # the next to ask may have more luck
                self._answers.pop(said.key).set_exception(error)
            return
        for said, value in zip(paths, values, strict=True):
            self._answers[said.key].set_result(value)

    def close(self, query: int) -> None:
        self._session.close(query)


@dataclass(frozen=True)
class SelfEvaluation:
    """The model's own opinion: p(yes) / (p(yes) + p(no)) behind a question about what it said.

    Attributes:
        suffix: tokens of the question.
        yes, no: tokens of the two answers.
    """

    suffix: tuple[int, ...]
    yes: int
    no: int
    latency: float = 0.0
    name: ClassVar[str] = "self-evaluation"

    @classmethod
    def asking(cls, asked: Asked, encode: Callable[[str], Sequence[int]]) -> SelfEvaluation:
        """The opinion that a question in words asks for.

        Raises:
            RequestError: the question is no token of this model, or an answer is not one of its
                own.
        """
        suffix = tuple(encode(asked.question))
        if not suffix:
            raise RequestError(
                f"scorer.question={asked.question!r} has no token of this model; ask something",
                "scorer.question",
            )
        said = dict[str, int]()
        for name in ("yes", "no"):
            text, ids = getattr(asked, name), encode(getattr(asked, name))
            if len(ids) != 1 or ids[0] in said.values():
                raise RequestError(
                    f"scorer.{name}={text!r} is {len(ids)} tokens of this model ({list(ids)}); "
                    "both answers must be one token, and different ones: give words of its "
                    "vocabulary",
                    f"scorer.{name}",
                )
            said[name] = ids[0]
        return cls(suffix, said["yes"], said["no"])

    def session(self, pool: EnginePool) -> Session:
        return _Together(partial(self._opinion, pool))

    async def _opinion(self, pool: EnginePool, said: Said) -> float:
        asked = (pool.weigh(said.node, self.suffix, token) for token in (self.yes, self.no))
        yes, no = await asyncio.gather(*asked)
        return 1 / (1 + math.exp(min(no - yes, 700.0)))


@dataclass(frozen=True)
class Oracle:
    """A program that looks at what a path says. It may know what no model can, so that experiments
    show how far better scores would take a search; its name marks whatever comes of it.

    Attributes:
        judge: from the texts of prompt and path to a number in [0, 1].
    """

    judge: Callable[[str, str], float]
    latency: float = 0.0
    name: ClassVar[str] = "oracle"

    def session(self, pool: EnginePool) -> Session:
        return _Together(self._opinion)

    async def _opinion(self, said: Said) -> float:
        return float(self.judge(said.decode(said.prompt), said.text))


@dataclass(frozen=True)
class OtherModel:
    """The reward head of another model, which reads every path on an engine of its own.

    Texts that begin alike are read once, by the other engine's paths. Models of one vocabulary
    exchange tokens, others text.

    Attributes:
        pool: paths of the other engine on the running event loop.
        translate: from tokens of prompt and path to the other model's; None: they are the same.
    """

    pool: Callable[[], EnginePool]
    translate: Callable[[Sequence[int]], Sequence[int]] | None = None
    latency: float = 0.0
    name: str = "other-model"

    def session(self, pool: EnginePool) -> Session:
        return _Reading(self, pool)


# ---- what the engine knows anyway --------------------------------------------------------


def _prm(pool: EnginePool, n: Node) -> asyncio.Future[float]:
    """No task of its own: there is one for every step of a search."""
    return pool.log_odds(n, _probability)


def _probability(log_odds: float) -> float:
    return 1 / (1 + math.exp(-min(max(log_odds, -60.0), 60.0)))


async def _confidence(pool: EnginePool, n: Node) -> float:
    """The probability of the path's tokens, on geometric average."""
    known = pool.stats(n)
    return math.exp(known.logprob / max(known.n_tokens, 1))


async def _certainty(pool: EnginePool, n: Node) -> float:
    """How far the likeliest tokens are from being alike, where 0 is the same for all of them.

    The confidence of a token (`Step.confidences`) is at least the logarithm of how many it looks
    at; its mean over the path is put on a scale from there on.
    """
    c = pool.stats(n).confidences
    usual = Gen(1).topk_logprobs
    return max(1 - usual * math.exp(-sum(c) / len(c)), 0.0) if c else 0.0


OWN: dict[str, ScoreOf] = {"prm": _prm, "confidence": _confidence, "certainty": _certainty}
"""Scorers that every pool has, though "prm" only where a reward head looks at paths."""


# ---- sessions ----------------------------------------------------------------------------


class _Together:
    """Paths that are scored one by one, side by side."""

    def __init__(self, opinion: Callable[[Said], Awaitable[float]]):
        self._opinion = opinion

    async def score_batch(self, paths: Sequence[Said]) -> Sequence[float]:
        return await asyncio.gather(*map(self._opinion, paths))

    def close(self, query: int) -> None:
        """There is nothing to give up."""


class _Reading:
    """What another engine has read of the paths of one pool."""

    def __init__(self, scorer: OtherModel, asking: EnginePool):
        self._translate, self._asking, self._pool = scorer.translate, asking, scorer.pool()
        self._read: dict[int, dict[tuple[int, ...], Node]] = {}  # by query, and whole text

    async def score_batch(self, paths: Sequence[Said]) -> Sequence[float]:
        nodes = [self._follow(said) for said in paths]
        return await asyncio.gather(*[self._pool.score(node, scorer="prm") for node in nodes])

    def _follow(self, said: Said) -> Node:
        """A path of the other engine with that text, grown from the longest it begins with."""
        text = self._words((*said.prompt, *said.tokens))
        query = said.node.query
        if query not in self._read:
            prompt = self._words(said.prompt)
            if text[: len(prompt)] != prompt:
                prompt = text[:1]
            root = self._pool.root(prompt, query=query, seed=0)
            self._read[query] = {prompt: root}
        known = self._read[query]
        lengths = sorted({len(start) for start in known}, reverse=True)
        start = next((text[:n] for n in lengths if text[:n] in known), None)
        if start is None:
            raise SearchError("the texts of one search begin with different tokens")
        if start != text:
            self._asking.charge(query, len(text) - len(start))
            known[text] = self._pool.follow(known[start], len(known), text[len(start) :])
        return known[text]

    def _words(self, tokens: Sequence[int]) -> tuple[int, ...]:
        return tuple(tokens if self._translate is None else self._translate(tokens))

    def close(self, query: int) -> None:
        if self._read.pop(query, None) is not None:
            self._pool.close(query)


def _looked_at(future: asyncio.Future[Any]) -> None:
    """Nobody may wait for it any more."""
    if not future.cancelled():
        future.exception()
