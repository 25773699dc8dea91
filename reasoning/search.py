"""Carries a tree search out, and may run ahead of it: specification, section 1.7.

Whatever arrives, the policy is shown results in the order in which it asked for them, and only
those. A speculative step is one that it has not asked for: it waits in a side table until it does
(then it is promoted) or cannot any more (then it is cancelled). So with `spec=None` and without,
in the lossless mode, the policy lives through the same search.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from jaxserve.protocol import (
    DeadPathError,
    Event,
    Failed,
    Gen,
    Ledger,
    Node,
    PathPool,
    Prio,
    Question,
    SearchError,
    Step,
    StepDone,
)
from reasoning.answers import Answer, Candidate, is_decided, tally, vote
from reasoning.inbox import Inbox
from reasoning.result import Budget, Piece, Result, Stopped, next_query
from reasoning.speculation import Coordinator, Guess, Speculator, affordable, pays, shadow_predict
from reasoning.tree import Expand, Grown, SearchPolicy, Tree, candidates
from reasoning.watchdog import limited

T = TypeVar("T")
_STALE = 8  # steps asked for since a guess was made
_ANY = 1 << 30  # an index that no policy asks for: what is refuted of it is of every other one


async def run_search(
    policy: SearchPolicy,
    pool: PathPool,
    question: Question,
    budget: Budget | None = None,
    *,
    spec: Speculator | None = None,
    scorer: str = "prm",
    coordinator: Coordinator | None = None,
    query: int | None = None,
) -> Result:
    """Searches for an answer, and closes its query whatever happens.

    Args:
        spec: None for the sequential search.
        coordinator: shared by the searches of a pool, it deals rows to the likeliest gains of all
            of them; by default the search has one of its own.
        query: a number that no other open search of the pool has; by default the next one.

    Raises:
        SearchError: the policy failed, or asks for nothing and is not done.
        DeadPathError: the policy asked for a child of a node that is not there, or has ended.
    """
    number = next_query() if query is None else query
    search = _Search(policy, pool, question, budget or Budget(), spec, scorer, coordinator, number)
    try:
        return await search.run()
    finally:
        search.coordinator.leave(search)
        pool.close(number)


@dataclass
class _Flight:
    """A step that was begun.

    Attributes:
        grown: its end, without a score if that is still on its way.
        complete: nothing more of it is awaited.
        guess: why it was begun, if that was speculation.
    """

    expand: Expand
    prio: Prio
    guess: Guess | None = None
    grown: Grown | None = None
    complete: bool = False


class _Search:
    """One query. `tree` is what the policy knows, `flights` everything that was begun."""

    def __init__(
        self,
        policy: SearchPolicy,
        pool: PathPool,
        question: Question,
        budget: Budget,
        spec: Speculator | None,
        scorer: str,
        coordinator: Coordinator | None,
        query: int,
    ):
        self.policy, self.pool, self.question, self.budget = policy, pool, question, budget
        self.spec, self.scorer, self.query = spec, scorer, query
        self.coordinator = coordinator or Coordinator()
        self.tree = Tree(pool.root(question.prompt, query=query, seed=question.seed))
        self.flights = dict[Node, _Flight]()
        self.guesses = dict[Node, _Flight]()  # those of them that nobody has asked for
        self.held = dict[Node, None]()  # committed, with pages
        self.refutes = type(policy).refuted is not SearchPolicy.refuted
        self.wasted = list[Grown]()
        self.began, self.policy_seconds = time.monotonic(), 0.0
        self.news = True  # since it last ran ahead
        self.guessed_at = 0  # when so much had been asked for
        self.last_gen = Gen(1), Gen(1)  # as asked for, and as it was handed on
        self.in_air = 0  # speculative steps that have not ended
        self.thought = 0.0  # seconds that guessing takes
        self.asked, self.refused, self.speculated, self.hits = 0, False, 0, 0

    async def run(self) -> Result:
        inbox = Inbox(self.pool.events(self.query), self.budget.seconds)
        try:
            self._ask()
            while (stopped := self._advance()) is None:
                self._speculate()
                for event in await inbox.wait():
                    self._take(event)
        finally:
            await inbox.close()
        return self._result(stopped)

    # ---- what the policy sees

    def _decide(self, ask: Callable[..., T], *with_: object) -> T:
        """A question to the policy: its time is kept, and its failure is its own query's."""
        began = time.perf_counter()
        try:
            return limited(self.budget.decision, self.policy.name, ask, *with_)
        except SearchError:
            raise
        except Exception as error:
            raise SearchError(f"{self.policy.name}: {type(error).__name__}: {error}") from error
        finally:
            self.policy_seconds += time.perf_counter() - began

    def _advance(self) -> Stopped | None:
        """Commits what is complete, in canonical order; says why the search is over, if it is."""
        while True:
            if self._decide(self.policy.done, self.tree):
                return "done"
            if self.tree.tokens >= self.budget.tokens or self._is_late():
                return "budget"
            if self._is_decided():
                return "decided"
            if not self.tree.pending:
                if self.refused:
                    return "budget"
                raise SearchError(
                    f"stalled: {self.policy.name} is not done, asks for nothing, and nothing is on "
                    f"its way after {len(self.tree.grown) - 1} steps"
                )
            flight = self.flights[next(iter(self.tree.pending))]
            if not flight.complete:
                return None
            assert flight.grown is not None
            self.tree.commit(flight.grown)
            if flight.grown.finished:
                self.pool.release(flight.grown.node)
            elif self.refutes:
                self.held[flight.grown.node] = None
            self._decide(self.policy.observe, self.tree, flight.grown)
            if self._ask() and self.refutes:  # only what it asks for rules anything out
                self._cancel_refuted()
                self._release()

    def _ask(self) -> bool:
        """Begins what the policy wants now, or finds that it was begun ahead of time.

        Returns whether that was anything new.
        """
        before = self.asked
        for expand in self._decide(self.policy.ready, self.tree):
            child = expand.child
            if child in self.tree.pending or child in self.tree.grown:
                continue
            parent = self.tree.grown.get(expand.parent)
            if parent is None or parent.finished:
                why = "is no node of its tree" if parent is None else "has ended"
                raise DeadPathError(f"{self.policy.name} continues {expand.parent}, which {why}")
            if self.asked >= self.budget.paths:
                self.refused = True
                break
            self.asked += 1
            self.tree.ask(expand)
            flight = self.flights.get(child)
            if flight is None:
                self._begin(expand, Prio.COMMIT)
                self._unforeseen(child)
            else:
                self._promote(flight)
        return self.asked > before

    def _unforeseen(self, child: Node) -> None:
        """Withdraws what it has on offer if that said nothing of what is asked for now."""
        offered = self.coordinator.offered(self)
        if offered and all(guess.expand.child != child for guess in offered):
            self.coordinator.leave(self)

    def _release(self) -> None:
        """Gives back the pages of nodes that will have no more children."""
        for expand in self._decide(self._refuted, [Expand(node, _ANY) for node in self.held]):
            self.pool.release(expand.parent)
            del self.held[expand.parent]

    def _refuted(self, expands: Sequence[Expand]) -> list[Expand]:
        return [expand for expand in expands if self.policy.refuted(self.tree, expand)]

    def _promote(self, flight: _Flight) -> None:
        flight.prio = Prio.COMMIT
        del self.guesses[flight.expand.child]
        self.in_air -= flight.grown is None
        self.pool.promote(flight.expand.child)
        self.hits += 1
        if flight.guess is not None:
            self.coordinator.learn(self.policy, flight.guess, True)

    def _is_late(self) -> bool:
        return time.monotonic() - self.began > self.budget.seconds

    # ---- what the pool does

    def _begin(self, expand: Expand, prio: Prio, guess: Guess | None = None) -> None:
        parent = self._look(expand.parent)
        left = self.question.max_tokens - parent.total
        gen = self._gen(expand.gen, min(expand.gen.max_tokens, left))
        child = self.pool.fork(expand.parent, expand.index)
        flight = self.flights[child] = _Flight(expand, prio, guess)
        if prio is Prio.SPEC:
            self.guesses[child] = flight
            self.in_air += 1
        self.pool.extend(child, gen, prio=prio)

    def _gen(self, asked: Gen, most: int) -> Gen:
        """What is asked for, to the end of a step; siblings are asked for alike."""
        last, gen = self.last_gen
        if asked is not last or most != gen.max_tokens:
            gen = replace(asked, stop=self.question.step, max_tokens=most)
            self.last_gen = asked, gen
        return gen

    def _look(self, node: Node) -> Grown:
        found = self.tree.grown.get(node)
        if found is None:
            found = self.flights[node].grown
        assert found is not None
        return found

    def _take(self, event: Event) -> None:
        flight = self.flights.get(event.node)
        if flight is None:
            return  # of a step that was given up
        if isinstance(event, Failed):
            self._fail(flight, event.error)
        elif isinstance(event, StepDone):
            flight.grown = self._end_of(flight.expand, event.step)
            self.in_air -= flight.prio is Prio.SPEC
            if self._decide(self.policy.wants_score, flight.grown):
                self.news |= self.spec is not None and self.spec.unscored
                self.pool.score(event.node, scorer=self.scorer, prio=flight.prio)
            else:
                flight.complete = self.news = True
        elif flight.grown is not None and event.scorer == self.scorer:
            g = flight.grown
            flight.grown = Grown(
                g.node, g.parent, g.step, event.value, g.answer, g.finished, g.total
            )
            flight.complete = self.news = True

    def _end_of(self, expand: Expand, step: Step) -> Grown:
        parent = self._look(expand.parent)
        total = parent.total + len(step.tokens)
        finished = step.reason == "end" or total >= self.question.max_tokens
        if step.reason == "length" and len(step.tokens) < expand.gen.max_tokens:
            finished = True  # the context is full
        answer = self._read(parent, step) if finished else None
        return Grown(expand.child, expand.parent, step, None, answer, finished, total)

    def _read(self, parent: Grown, step: Step) -> Hashable | None:
        steps, above = [step], parent
        while above.parent is not None:
            steps.append(above.step)
            above = self._look(above.parent)
        return self.question.read([token for step in reversed(steps) for token in step.tokens])

    def _fail(self, flight: _Flight, error: Exception) -> None:
        if flight.prio == Prio.SPEC:
            self._give_up(flight.expand.child)
        elif isinstance(error, SearchError):
            raise error
        else:
            raise SearchError(f"{flight.expand.child}: {error}") from error

    # ---- speculation

    def flying(self) -> int:
        return self.in_air

    def begin(self, guess: Guess) -> bool:
        """Runs ahead, unless the search has gone on since this seemed a good idea."""
        expand = guess.expand
        parent = self.tree.grown.get(expand.parent)
        if parent is None:
            flight = self.flights.get(expand.parent)
            parent = flight.grown if flight else None
        known = expand.child in self.flights or parent is None or parent.finished
        if known or (self.refutes and self._decide(self._refuted, [expand])):
            return False
        self.speculated += 1
        self._begin(expand, Prio.SPEC, guess)
        return True

    def _speculate(self) -> None:
        """Begins what is worth it. Guesses that found no row wait for one, and are not made again
        while they prove right."""
        spec = self.spec
        if spec is None or not spec.width or not self.news:
            return
        if not spec.unscored and all(self.flights[node].grown for node in self.tree.pending):
            return  # scores come at once, and with them a decision
        self.news = False
        capacity = self.pool.capacity()
        free = min(spec.width - self.flying(), affordable(capacity))
        if free <= 0:
            return
        if self.asked - self.guessed_at < _STALE and self.coordinator.offered(self):
            self.coordinator.deal(capacity)
            return
        tokens = self.tree.tokens / len(self.tree.grown)
        trust, before = self.coordinator.trust, self.speculated
        if not pays(capacity, min(free, trust.usual(self.policy)), tokens, self.thought):
            trust.spared(self.policy)
            return
        self.guessed_at, began = self.asked, time.thread_time()
        guesses = self._decide(self._guesses, spec, free)
        self.coordinator.offer(self, guesses, spec)
        took = time.thread_time() - began  # without what others do meanwhile
        self.thought = took if not self.thought else 0.8 * self.thought + 0.2 * took
        self.coordinator.deal(capacity)
        trust.tried(self.policy, self.speculated - before)

    def _guesses(self, spec: Speculator, free: int) -> list[Guess]:
        """What it might ask for, looked for the longer the more rows there are for that."""
        ahead = self._ahead()
        if not spec.unscored:
            ahead = {node: grown for node, grown in ahead.items() if self.flights[node].complete}
        spec = replace(spec, patience=min(spec.patience, 4 * free))
        replay = shadow_predict(self.policy, self.tree.clone(ahead), self.flights, spec)
        return list(itertools.islice(replay, spec.width))

    def _ahead(self) -> dict[Node, Grown]:
        """Steps that have ended and are not committed, speculative or not."""
        grown = self.tree.grown
        return {n: f.grown for n, f in self.flights.items() if f.grown and n not in grown}

    def _cancel_refuted(self) -> None:
        if not self.guesses or self.spec is None:
            return
        surplus_votes = self.spec.mode == "opportunistic"
        for expand in self._decide(self._refuted, [f.expand for f in self.guesses.values()]):
            flight = self.guesses.get(expand.child)  # None: given up with what it continues
            if flight and not (surplus_votes and flight.grown and flight.grown.finished):
                self._give_up(expand.child)

    def _give_up(self, node: Node) -> None:
        """Cancels a speculative step and all that was built on it."""
        self.pool.cancel(node)
        depth = len(node.path)
        for child in [n for n in self.flights if n.path[:depth] == node.path]:
            flight = self.flights.pop(child)
            if self.guesses.pop(child, None) is not None:
                self.in_air -= flight.grown is None
            if flight.grown is not None:
                self.wasted.append(flight.grown)
            if flight.guess is not None:
                self.coordinator.learn(self.policy, flight.guess, False)

    # ---- the end

    def _is_decided(self) -> bool:
        """Whether no vote can change the answer. What is pending and complete has its vote too."""
        if self.spec is None or self.spec.stop == "never":
            return False
        view = self.tree.clone()
        for node in self.tree.pending:
            flight = self.flights[node]
            if flight.complete and flight.grown is not None:
                view.commit(flight.grown)
        missing = self._decide(self.policy.missing, view)
        if missing is None:
            return False
        votes = self._decide(self.policy.votes, view)
        decided = is_decided(tally(votes), missing, self._decide(self.policy.largest, view))
        if decided or (self.spec.stop == "paper" and is_likely(votes, missing)):
            self.tree = view
            return True
        return False

    def _surplus(self) -> Answer:
        """The answer when finished speculation may vote; what has a vote is committed."""
        view = self.tree.clone(self._ahead())
        extra = [g for n, g in view.ahead.items() if g.finished and self.flights[n].complete]
        for grown in extra:
            for above in view.way(grown.node):
                flight = self.flights[above.node]
                if flight.prio == Prio.SPEC:
                    self._promote(flight)
        votes = self._decide(self.policy.votes, self.tree)
        return vote([*votes, *candidates(view, extra, "min")])

    def _result(self, stopped: Stopped) -> Result:
        surplus = self.spec is not None and self.spec.mode == "opportunistic"
        answer = self._surplus() if surplus else self._decide(self.policy.answer, self.tree)
        if stopped == "done":
            for flight in self.guesses.values():
                if flight.guess is not None:
                    self.coordinator.learn(self.policy, flight.guess, False)
        ledger = self.pool.close(self.query)
        return Result(
            answer=answer.answer,
            distribution=answer.distribution,
            ledger=ledger,
            stopped=stopped,
            controller=self.policy.name,
            best=answer.best,
            tree=tuple(self._pieces(stopped)),
            mode=self.spec.mode if self.spec else "off",
            notes=self._notes(ledger),
        )

    def _notes(self, ledger: Ledger) -> dict[str, float]:
        return {
            "policy_seconds": self.policy_seconds,
            "seconds": time.monotonic() - self.began,
            "steps": len(self.tree.grown) - 1,
            "tree_tokens": self.tree.tokens,
            "speculated": self.speculated,
            "hits": self.hits,
            "hit_rate": self.hits / max(self.speculated, 1),
            "waste_ratio": ledger.waste_ratio,
        }

    def _pieces(self, stopped: Stopped) -> list[Piece]:
        text = self.question.text
        wasted = [*self.wasted]
        wasted += [flight.grown for flight in self.guesses.values() if flight.grown]
        found = list[Piece]()
        for grown in [*self.tree.grown.values(), *wasted]:
            state = "live"
            if grown.node not in self.tree.grown:
                state = "wasted"
            elif grown.finished:
                state = "finished"
            elif grown.node not in self.tree.children and stopped == "done":
                state = "pruned"
            tokens = grown.step.tokens
            words = text(tokens) if text else ""
            found.append(
                Piece(grown.node, grown.parent, tokens, words, grown.score, grown.answer, state)
            )
        return found


def is_likely(votes: Sequence[Candidate], missing: int) -> bool:
    """Whether votes to come will hardly change the winner (SPEX's T3; section 1.6).

    The paper's rule with the gate of its artifact: half of the votes are in, and those for the
    leader, three or more, are sure of it.
    """
    weights = dict[Hashable, list[float]]()
    for one in votes:
        if one.answer is not None:
            weights.setdefault(one.answer, []).append(one.weight)
    first, second = [*sorted(weights.values(), key=sum, reverse=True), [], []][:2]
    if len(first) < 3 or statistics.median(first) <= 0.95 or len(votes) < missing:
        return False
    typical = sum(second) / max(len(second), 1)
    return sum(first) - sum(second) > 0.5 * missing * typical
