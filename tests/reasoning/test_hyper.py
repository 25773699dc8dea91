"""HyPER: what it prunes, merges, forks and refines, and how its derivations vote."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from random import Random

import pytest

from jaxserve.protocol import Node, PathStats, Question, RouteNoise, Step
from reasoning.answers import LengthConfidence, lead
from reasoning.controllers.hyper import HyPER
from reasoning.controllers.hyper_scores import Scores
from reasoning.derivations import Derivation, Survey, weigh
from reasoning.pool import Path, PoolView, Probed, Prune, first, run_pool
from reasoning.result import Budget, Result
from reasoning.signals import groups, likeness, redundancy
from tests.reasoning.fake_pool import END, QUESTION, STEP, FakePool, Text, read, text

SURE, FREE, LOST = 9.0, 4.0, 1.0  # confidences; the fake's entropies are 0, 1 and 4 nats


def chain(*steps: tuple[int, int], answer: int = 2, lost: int | None = None) -> Text:
    """Steps of a move and the state it leads to; moves are free, and one state may be unsure."""
    tokens, conf = list[int](), list[float]()
    for i, (move, state) in enumerate(steps):
        tokens += [move, move, state, STEP]
        conf += [FREE, SURE, LOST if i == lost else SURE, SURE]
    return Text((*tokens, answer, END), (*conf, SURE, SURE))


def state(tokens: Sequence[int]) -> tuple[int, ...] | None:
    return tuple(tokens[-2:]) if tokens and tokens[-1] == STEP else None


CHAIN = Question((7,), read, step=(STEP,), max_tokens=64, state=state)


def run(policy: HyPER, pool: FakePool, question: Question = CHAIN, **options) -> Result:
    budget = options.pop("budget", Budget())
    return asyncio.run(run_pool(policy, pool, question, budget, query=0, **options))


def seen(*texts: Text, question: Question = CHAIN, finished: bool = True) -> PoolView:
    """A view of paths that have said all they will."""
    view = PoolView(question, Budget(tokens=1000))
    for i, t in enumerate(texts):
        entropies = tuple(max(5.0 - c, 0.0) for c in t.confidences)
        zeros = (0.0,) * len(t.tokens)
        stats = PathStats(t.tokens, zeros, entropies, zeros, t.confidences)
        path = Path(Node(0, ((i, -1),)), stats=stats)
        if finished:
            path.state, path.answer = "finished", question.read(t.tokens)
        view.paths.append(path)
    return view


def test_unsure_paths_are_pruned_in_the_round_in_which_they_become_unsure():
    pool = FakePool([text(4), text(5, dip=1.0)])
    result = run(HyPER(width=2, novelty=2.0), pool, QUESTION)
    assert [p.state for p in result.tree[1:]] == ["finished", "pruned"]
    assert len(result.tree[2].tokens) == 3 and result.distribution.keys() == {4}


def test_the_floor_may_come_from_a_warm_up():
    texts = [text(4, dip=1.0 + i, confidence=10.0) for i in range(4)]
    policy = HyPER(floor=None, warmup=4, keep=0.5, novelty=2.0)
    result = run(policy, FakePool(texts), QUESTION)
    view = seen(*texts, question=QUESTION)
    assert policy.threshold(view) == pytest.approx(2.5)
    view.paths[0].state = "live"
    assert policy.threshold(view) is None
    assert result.notes["paths"] == 4 and result.answer == 4


def test_an_unsure_answer_is_better_than_none():
    result = run(
        HyPER(width=2, novelty=2.0), FakePool([text(4, dip=1.0), text(5, dip=2.0)]), QUESTION
    )
    assert result.answer == 5, "the least unsure goes on"
    assert sorted(p.state for p in result.tree[1:]) == ["finished", "pruned"]


def test_the_last_path_of_a_leading_answer_is_not_pruned():
    view = seen(*[text(4, dip=1.0)] * 3, text(4), text(4), question=QUESTION, finished=False)
    step = Step((0,), "end")
    for path, answer in zip(view.paths, (6, 6, 7, 4, 4), strict=True):
        path.probes.append(Probed(answer, step, 3))
    pruned = [a.node for a in HyPER(width=1).step(view) if isinstance(a, Prune)]
    assert pruned == [view.paths[0].node, view.paths[2].node], "one that says 6 is left"


def test_paths_that_reach_one_state_are_one_from_there():
    a = chain((30, 10), (31, 11), answer=2)
    b = chain((32, 12), (33, 10), (31, 11), answer=2)
    known = Survey(3.0, 1, 2).of(seen(a, b))
    found = known.derivations()
    assert len(found) == 2 and {d.answer for d in found} == {2}
    assert {len(d.claims) for d in found} == {2, 3}
    assert (30, 30) in found[0].claims, "a claim is a step less the state it repeats"
    assert known.places[10, STEP].tries == 2 and len(known.places[10, STEP].ways) == 1


def test_derivations_are_combined_of_what_different_paths_have_shown():
    a = chain((30, 10), (31, 11), answer=2)
    b = chain((32, 10), (33, 12), answer=3, lost=1)
    found = Survey(3.0, 1, 2).of(seen(a, b)).derivations()
    assert [(d.answer, sorted(d.claims)) for d in found] == [
        (2, [(30, 30), (31, 31)]),
    ], "equal moves between two states are one, and nothing follows from an unsure step"


def test_repetitions_are_stopped_and_their_ways_still_count():
    """Both reach state 10, by different moves; what follows is free of choice, so one is enough."""
    a = chain((30, 10), (31, 11), answer=2)
    b = chain((32, 14), (30, 10), (31, 11), answer=2)
    result = run(HyPER(width=2, novelty=0.9, period=2), FakePool([a, b]))
    first, second = result.tree[1:]
    assert (first.state, second.state) == ("finished", "pruned")
    assert len(second.tokens) < len(b.tokens)
    alone = run(HyPER(width=2, novelty=0.9, period=2, alike=0), FakePool([a, b]))
    assert [p.state for p in alone.tree[1:]] == ["finished", "finished"]
    assert run(HyPER(width=2, novelty=0.9), FakePool([a, b])).answer == 2


def test_a_branch_begins_at_a_sure_state_and_costs_the_rest():
    dead = chain((30, 10), (31, 11), answer=2, lost=1)
    other = chain((30, 10), (34, 13), answer=3)
    pool = FakePool([dead], branches=[other])
    result = run(HyPER(width=1, deep=5.0, period=4, paths=2), pool)
    first, branch = result.tree[1:]
    assert branch.parent == first.node and branch.node.path[-1][1] == 4, "at the first closed step"
    assert branch.tokens == other.tokens[4:] and result.answer == 3
    assert result.notes["spent"] == 8 + 6


def test_branches_stop_where_nothing_new_is_to_be_expected():
    same = chain((30, 10), answer=2)
    result = run(HyPER(width=1, paths=50, novelty=0.05, safe=0), FakePool([same], branches=[same]))
    assert result.stopped == "done" and 2 <= result.notes["paths"] < 50
    forced = chain((30, 10), answer=2)
    forced = Text(forced.tokens, (SURE,) * len(forced.tokens))
    result = run(
        HyPER(width=1, paths=50, novelty=0.05, safe=0), FakePool([forced], branches=[forced])
    )
    assert result.notes["paths"] == 1, "one next token in effect: a fork would say the same"


def test_the_budget_is_kept_for_paths_that_can_be_finished():
    texts = [chain((30 + i, 10 + i), answer=2) for i in range(9)]
    result = run(HyPER(width=1), FakePool(texts), budget=Budget(tokens=11))
    assert result.stopped == "done" and result.notes["spent"] == 6


def test_a_shared_error_counts_once():
    """Three ways to 2 rest on one claim, two ways to 3 on none in common."""
    x = (1,)
    known = [Derivation(2, frozenset({x, (i,)}), 1.0, 5) for i in (2, 3, 4)]
    known += [
        Derivation(3, frozenset({(5,), (6,)}), 1.0, 5),
        Derivation(3, frozenset({(7,)}), 1.0, 5),
    ]
    plain, fair = (weigh(known, LengthConfidence(), support) for support in (0.0, 1.0))
    assert next(iter(plain)) == 2 and next(iter(fair)) == 3
    assert fair[2] / fair[3] == pytest.approx(1.5 / 2.718281828), "a support of one against two"
    assert weigh([], LengthConfidence(), 1.0) == {}


def test_how_far_the_best_answer_leads_is_counted_in_false_claims():
    a, b, c = (1,), (2,), (3,)
    assert lead([]) == 0
    assert lead([(2, {a, b})]) == 1, "one claim may be false, and nobody knows the answer"
    assert lead([(2, {a, b}), (2, {b, c})]) == 1, "they share one"
    assert lead([(2, {a}), (2, {b}), (2, {c})]) == 3
    assert lead([(2, {a}), (2, {b}), (3, {c})]) == 1 and lead([(2, {a}), (3, {b})]) == 0


def test_a_search_ends_once_its_answer_is_safe():
    """Three ways to 2 with no claim in common."""
    texts = [chain((30 + 2 * i, 10 + i), (31 + 2 * i, 20 + i), answer=2) for i in range(3)]
    ended = {
        safe: run(HyPER(width=1, safe=safe, novelty=1e-3), FakePool(texts, branches=texts))
        for safe in (2, 3)
    }
    assert ended[2].notes["spent"] < ended[3].notes["spent"]
    assert ended[2].stopped == "done" and ended[2].answer == ended[3].answer == 2


def test_a_slip_is_no_step_and_its_path_is_given_up():
    """Its text goes on as surely as others do, but one token of it was drawn against the odds."""
    good, slip = chain((30, 10), (31, 11), answer=2), chain((32, 12), (34, 13), answer=3)

    class Slippery(FakePool):
        def stats(self, n):
            said = super().stats(n)
            odds = tuple(-4.0 if t == 34 else 0.0 for t in said.tokens)
            return replace(said, logprobs=odds, entropies=(1.0,) * len(odds))

    policy = HyPER(width=2, paths=2, novelty=1e-9)
    result = run(policy, Slippery([good, slip]))
    assert [p.state for p in result.tree[1:]] == ["finished", "pruned"]
    assert result.distribution.keys() == {2}
    kept = run(replace(policy, slip=3.5), Slippery([good, slip]))
    assert kept.distribution.keys() == {2, 3}, "three nats are within 3.5"

    view = seen(good, slip)
    odds = tuple(-4.0 if t == 34 else 0.0 for t in slip.tokens)
    view.paths[1].stats = replace(view.paths[1].stats, logprobs=odds)
    known = Survey(3.0, 1, 2, 1.5).of(view)
    assert known.places[()].tries == 2 and (13, STEP) not in known.places
    place = known.places[12, STEP]
    assert place.tries == 0 and not place.ways, "nor does it count as a try"


def test_a_graph_that_grows_is_the_graph_of_the_whole():
    """Token by token or at once: the same places, ways and derivations."""
    rng = Random(0)
    texts = [
        chain(*[(30 + rng.randrange(4), 10 * d + rng.randrange(3)) for d in (1, 2, 3)],
              answer=2 + i % 2, lost=rng.choice([None, None, 1]))
        for i in range(12)
    ]  # fmt: skip
    whole, slow = seen(*texts), seen(*texts, finished=False)
    full = [path.stats for path in slow.paths]
    for n in range(max(len(s.tokens) for s in full) + 1):
        for path, stats in zip(slow.paths, full, strict=True):
            path.stats = first(stats, n)
            if n >= stats.n_tokens and path.state == "live":
                path.state, path.answer = "finished", CHAIN.read(stats.tokens)
        grown = Survey(3.0).of(slow)
    known = Survey(3.0).of(whole)

    def shape(m):
        return {s: (p.tries, set(p.ways), p.width, set(p.moves)) for s, p in m.places.items()}

    assert shape(grown) == shape(known) and grown.length == known.length
    answers = [sorted(d.answer for d in m.derivations()) for m in (grown, known)]
    assert answers[0] == answers[1] and len(answers[0]) > 3
    assert Survey(3.0).of(whole) is known, "kept from round to round"


@pytest.mark.parametrize("window", [1, 2, 3, 5])
def test_the_least_of_a_step_is_that_of_its_windows_however_it_grows(window):
    t = Text((30, 31, 32, 33, 34, 35, STEP, 10, STEP), (9, 4, 8, 2, 9, 9, 9, 5, 9))
    view = seen(t, finished=False)
    full = view.paths[0].stats
    for n in (1, 2, 4, 5, 7):
        view.paths[0].stats = first(full, n)
        known = Survey(-1.0, window).of(view)
    (move,) = known.places[()].moves.values()
    assert move.least == pytest.approx(min(groups(t.confidences[:7], window)))


def test_the_likeness_of_a_large_pool_is_that_of_some_of_its_pairs():
    few = [PathStats((i, i, 5)) for i in range(4)]
    pairs = [likeness(a, b, 3, 1) for i, a in enumerate(few) for b in few[i + 1 :]]
    assert redundancy(few, 3, 1) == pytest.approx(sum(pairs) / 6)
    many = [PathStats((7, 7, 7)) for _ in range(80)]
    assert redundancy(many, 3) == 1.0
    halves = [PathStats((i % 2,) * 3) for i in range(80)]
    assert redundancy(halves, 3) == pytest.approx(0.5, abs=0.2)


def test_scores_count_where_they_are_trusted():
    texts = [text(4), text(5)]
    for trust, answer in ((0.0, 4), (1.0, 5)):
        pool = FakePool(texts, scores=[0.1, 0.9])
        policy = HyPER(width=2, novelty=2.0, trust=trust)
        assert run(policy, pool, QUESTION, scorer="prm").answer == answer


def test_the_phase_moves_from_exploring_to_exploiting():
    scores, view = Scores(), seen(text(4), text(4), question=QUESTION)
    view.spent = 500
    assert scores.phase(view, 1.0) == pytest.approx(0.5 * 0.5 + 0.3 + 0.2)
    view.spent, view.paths = 0, []
    assert scores.phase(view, 0.0) == 0
    early, late = (_scores(spent) for spent in (0, 1000))
    assert early["branch"] > late["branch"] and early["single"] == 0 < late["single"]
    assert early["multi"] == 0 < _scores(500)["multi"]


def _scores(spent: int) -> dict[str, float]:
    view = seen(text(4, dip=1.0), text(5), question=QUESTION, finished=False)
    view.spent = spent
    return Scores().of(view, view.live, 3.5, 1, 4)


def test_an_action_goes_on_until_another_is_clearly_better():
    view = seen(text(4), text(5), question=QUESTION, finished=False)

    def choose(branch: float) -> str:
        return Scores().choose(view, {"none": 0.5, "branch": branch})

    assert [choose(x) for x in (0.55, 0.65, 0.45, 0.35, 0.55)] == [
        "none", "branch", "branch", "none", "none",
    ]  # fmt: skip


def test_refinement_and_segments_are_off_unless_asked_for():
    eager = Scores(hysteresis=-1.0)

    class Late(Scores):
        def of(self, *args):
            return dict.fromkeys(super().of(*args), 0.0) | {self.wanted: 1.0}

        wanted = "single"

    texts = [text(4), text(5)]
    pool = FakePool(texts)
    assert run(HyPER(scores=eager), pool, QUESTION).ledger.effective == 0
    pool = FakePool(texts)
    route = RouteNoise(K=3)
    result = run(HyPER(scores=Late(), route=route, novelty=2.0), pool, QUESTION)
    assert pool.routed and result.ledger.effective == 2 * 5, "one path, all but its first round"

    class Multi(Late):
        wanted = "multi"

    pool = FakePool(texts, branches=[text(4), text(6, confidence=5.0)])
    result = run(HyPER(scores=Multi(), segment=(3, 2), novelty=2.0), pool, QUESTION)
    assert any(len(node.path) > 1 for node in pool.forked) and result.answer in (4, 5)


def test_the_safe_test_stops_a_plain_vote_that_is_decided():
    same = [text(4)]
    policy = HyPER(width=4, paths=5, alike=0, support=0.0, period=8)
    result = run(policy, FakePool(same), QUESTION)
    assert result.stopped == "decided" and result.answer == 4 and result.notes["paths"] == 4


def test_a_pool_that_reports_tokens_alone_is_voted_on():
    class Bare(FakePool):
        def stats(self, n):
            return PathStats(super().stats(n).tokens)

    result = run(HyPER(width=3), Bare([text(4), text(5), text(4)]), QUESTION)
    assert result.answer == 4 and result.notes["paths"] == 3


def test_unread_paths_have_no_vote():
    mute = Text((100, STEP, 101), (9.0, 9.0, 9.0))
    result = run(HyPER(width=2), FakePool([mute]), QUESTION)
    assert result.answer is None and result.distribution == {} and result.best is None
