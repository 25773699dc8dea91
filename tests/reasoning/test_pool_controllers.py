"""Every pool controller: within its budget, the same again, and its own rule to the letter."""

from __future__ import annotations

import asyncio
import math
from collections import Counter

import pytest

from reasoning.controllers.adaptive_consistency import AdaptiveConsistency, leads
from reasoning.controllers.best_of_n import BestOfN
from reasoning.controllers.certaindex import Certaindex
from reasoning.controllers.deepconf import DeepConf
from reasoning.controllers.esc import EarlyStopping
from reasoning.controllers.hyper import HyPER
from reasoning.controllers.self_consistency import SelfConsistency
from reasoning.controllers.slim_sc import SlimSC
from reasoning.pool import PoolPolicy, run_pool
from reasoning.result import Budget, Result
from tests.reasoning.fake_pool import QUESTION, FakePool, Text, text

MIXED = [text(2 + i * i % 3, length=7 + i % 4, confidence=5 + i * 7 % 5) for i in range(40)]
ANSWERS = [2 + i * i % 3 for i in range(40)]
POLICIES: list[PoolPolicy] = [
    SelfConsistency(paths=20),
    BestOfN(paths=20),
    BestOfN(paths=20, choose="vote"),
    AdaptiveConsistency(paths=20),
    EarlyStopping(paths=20),
    Certaindex(paths=20, suffix=(6,), period=4),
    DeepConf(paths=20, window=2, period=4),
    SlimSC(paths=20, period=4, delay=4, window=8),
    HyPER(paths=20, period=3),
    HyPER(paths=20, floor=None, warmup=6),
]


def run(policy: PoolPolicy, pool: FakePool, budget: Budget | None = None, **options) -> Result:
    return asyncio.run(run_pool(policy, pool, QUESTION, budget or Budget(), query=0, **options))


def by_name(policy: PoolPolicy) -> str:
    return f"{policy.name}-{POLICIES.index(policy)}"


@pytest.mark.parametrize("policy", POLICIES, ids=by_name)
def test_every_controller_keeps_to_pool_and_budget(policy: PoolPolicy):
    for tokens in (1, 10, 50, 100, 1000):
        result = run(policy, FakePool(MIXED), Budget(tokens=tokens))
        spent = result.ledger.committed + result.ledger.effective
        assert spent == result.notes["spent"] <= tokens
        assert result.notes["paths"] <= 20
        assert result.controller == policy.name and result.notes["policy_seconds"] > 0


@pytest.mark.parametrize("policy", POLICIES, ids=by_name)
def test_every_controller_replays(policy: PoolPolicy):
    budget = Budget(tokens=120)
    runs = [run(policy, FakePool(MIXED, order=order), budget) for order in (None, 1, 2)]
    assert len({(r.answer, r.tree, r.stopped, tuple(r.distribution.items())) for r in runs}) == 1


@pytest.mark.parametrize("policy", POLICIES, ids=by_name)
def test_every_controller_finds_an_answer(policy: PoolPolicy):
    result = run(policy, FakePool(MIXED))
    assert result.answer in ANSWERS or isinstance(policy, Certaindex)
    assert result.stopped == "done" and result.distribution


@pytest.mark.parametrize("policy", POLICIES, ids=by_name)
def test_no_answer_is_no_vote(policy: PoolPolicy):
    mute = FakePool([Text((100, 101, 102), (9.0, 9.0, 9.0))])
    if isinstance(policy, Certaindex):
        mute.says = 0  # its read answer: the token before END is an END
    result = run(policy, mute)
    assert result.answer in (None, 0)


@pytest.mark.parametrize("n", [1, 4, 9, 20])
def test_self_consistency_is_the_majority_of_the_first_n(n: int):
    result = run(SelfConsistency(paths=n), FakePool(MIXED))
    counts = Counter(ANSWERS[:n])
    assert result.distribution == counts
    assert result.answer == counts.most_common(1)[0][0]


def test_best_of_n_is_the_answer_of_the_best_path():
    scores = [0.1, 0.2, 0.9, 0.3]
    result = run(BestOfN(paths=4), FakePool(MIXED, scores=scores), scorer="prm")
    assert result.answer == ANSWERS[2] and result.best == result.tree[3].node
    policy = BestOfN(paths=4, choose="vote")
    votes = run(policy, FakePool(MIXED, scores=scores), scorer="prm").distribution
    assert votes[ANSWERS[1]] == pytest.approx(0.2 + 0.9)
    assert run(BestOfN(paths=4), FakePool(MIXED)).answer == ANSWERS[0], "all alike: the first"


@pytest.mark.parametrize("a,b", [(0, 0), (1, 0), (3, 1), (4, 0), (10, 3), (60, 40)])
def test_the_beta_test_is_the_integral_it_stands_for(a: int, b: int):
    n = 20_000
    xs = [(i + 0.5) / n for i in range(n)]
    heights = [a * math.log(x) + b * math.log(1 - x) for x in xs]
    top = max(heights)
    density = [math.exp(h - top) for h in heights]
    assert leads(a, b) == pytest.approx(sum(density[n // 2 :]) / sum(density), abs=1e-6)


def test_adaptive_consistency_stops_once_the_lead_is_sure():
    same = run(AdaptiveConsistency(paths=20), FakePool([text(4)]))
    assert same.notes["paths"] == 4, "1 - 2**-5 is the first above .95"
    split = run(AdaptiveConsistency(paths=20), FakePool([text(4), text(5)]))
    assert split.notes["paths"] == 20
    wide = run(AdaptiveConsistency(paths=20, batch=6), FakePool([text(4)]))
    assert wide.notes["paths"] == 6


def test_esc_stops_at_a_unanimous_window():
    texts = [text(4), text(5), text(4), text(4), text(4), text(4), text(5)]
    result = run(EarlyStopping(paths=40, window=3), FakePool(texts))
    assert result.notes["paths"] == 6 and result.distribution == {4: 5, 5: 1}
    mute = FakePool([Text((100,), (9.0,))])
    assert run(EarlyStopping(paths=9, window=3), mute).notes["paths"] == 9


def test_certaindex_stops_paths_whose_probes_agree():
    long = [text(4, length=40)]
    result = run(Certaindex(paths=2, suffix=(6,), equal=3, period=4), FakePool(long, says=5))
    assert result.answer == 5 and result.distribution == {5: 2}
    assert [p.state for p in result.tree[1:]] == ["pruned", "pruned"]
    assert result.notes["spent"] == 2 * (4 * 4 + 3 * 2), "three probes, one round apart"
    unsure = Certaindex(paths=2, suffix=(6,), equal=3, hedge=6, period=4)
    hedged = run(unsure, FakePool(long, says=5))
    assert hedged.answer == 4, "an unsure probe counts for nothing"


def test_deepconf_sets_its_threshold_by_the_warm_up():
    """Ten traces of least confidence 1 to 10; the top 30 % lie above 7.3."""
    texts = [text(4 + i // 9, dip=1.0 + i, confidence=10.0) for i in range(10)]
    texts += [text(5, dip=7.2, confidence=10.0), text(6, dip=7.4, confidence=10.0)]
    policy = DeepConf(paths=12, warmup=10, keep=0.3, window=1, period=4, consensus=1.0, batch=2)
    result = run(policy, FakePool(texts))
    assert [p.state for p in result.tree[11:]] == ["pruned", "finished"]
    assert result.tree[11].tokens == texts[10].tokens[:4], "stopped in the round of its dip"
    assert result.distribution == {
        4: pytest.approx(8 + 9),
        5: pytest.approx(10),
        6: pytest.approx(7.4),
    }
    plain = DeepConf(
        paths=12, warmup=10, keep=0.3, window=1, period=4, consensus=1.0, filter_warmup=False
    )
    assert run(plain, FakePool(texts)).distribution[4] == pytest.approx(45)


def test_deepconf_looks_at_windows_and_stops_at_consensus():
    dips = [text(4, dip=1.0, confidence=9.0) for _ in range(30)]
    result = run(DeepConf(paths=30, warmup=4, window=8, keep=0.9), FakePool(dips))
    assert result.distribution == {4: pytest.approx(4 * 8.0)}, "a dip in a window of eight"
    assert result.notes["paths"] == 4 and result.stopped == "done"
    short = run(DeepConf(paths=3, warmup=16, window=8, keep=0.9), FakePool(dips))
    assert short.notes["paths"] == 3 and short.answer == 4


def test_slim_sc_keeps_the_surer_of_two_alike():
    texts = [text(4, confidence=5), text(4, confidence=7), text(5, confidence=6)]
    result = run(SlimSC(paths=3, similar=0.9, window=8, delay=4, period=4), FakePool(texts))
    assert [p.state for p in result.tree[1:]] == ["pruned", "finished", "finished"]
    late = run(SlimSC(paths=3, similar=0.9, window=8, delay=6, period=4), FakePool(texts))
    assert late.distribution == {4: 2, 5: 1}, "they were through before they were judged"


@pytest.mark.parametrize(
    "make",
    [
        lambda: SelfConsistency(paths=0),
        lambda: BestOfN(choose="worst"),  # pyright: ignore[reportArgumentType]
        lambda: AdaptiveConsistency(sure=0.2),
        lambda: EarlyStopping(window=0),
        lambda: Certaindex(equal=0),
        lambda: DeepConf(keep=2),
        lambda: SlimSC(similar=0),
        lambda: HyPER(width=0),
    ],
)
def test_settings_are_checked(make):
    with pytest.raises(ValueError, match=r"\("):
        make()
