"""`LLM.search` on a shipped model: results, interrupts, failures, and searches that never end."""

from __future__ import annotations

import asyncio
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

from jaxserve import LLM, SamplingParams
from jaxserve.engine.runner import Runner
from jaxserve.errors import EngineError, RequestError
from jaxserve.protocol import Cancelled, Event, Gen, SearchError, StepDone
from jaxserve.searches import controller_of
from reasoning.answers import vote
from reasoning.controllers import CONTROLLERS
from reasoning.controllers.best_of_n import BestOfN
from reasoning.controllers.certaindex import Certaindex
from reasoning.controllers.hyper import HyPER
from reasoning.controllers.rebase import Rebase
from reasoning.controllers.self_consistency import SelfConsistency
from reasoning.pool import Action, Fork, PoolView, Probe
from reasoning.questions import question_of
from reasoning.result import Budget, Result
from reasoning.speculation import Speculator
from reasoning.tasks import distinct, make_task
from reasoning.tree import Expand, Tree
from tests.interrupting import interrupted
from tests.jaxserve.server.live_server import wait_until

MODEL = Path(__file__).parents[2] / "models/modchain-moe"
PROMPT, OTHER = "12 9 2 4 5 :", "3 7 11 2 20 :"
VOTE = SelfConsistency(paths=6)


@pytest.fixture(scope="module")
def engine() -> Iterator[LLM]:
    with LLM(MODEL, progress=False, max_num_batched_tokens=64) as llm:
        llm.wait_until_warm()
        yield llm


@pytest.fixture
def llm(engine: LLM) -> Iterator[LLM]:
    """Afterwards nothing runs, and every page has come back."""
    yield engine
    assert engine.drain(10)
    stats = engine.stats()
    assert stats.num_free_pages == stats.num_pages


@dataclass(frozen=True)
class Endless:
    """Begins a path for each that has ended; never says that it is enough."""

    period: int = 4
    name: ClassVar[str] = "endless"
    branching: ClassVar[bool] = False

    def start(self, view: PoolView) -> list[Action]:
        return [Fork(i) for i in range(4)]

    def step(self, view: PoolView) -> list[Action]:
        return [Fork(len(view.paths) + i) for i in range(4 - len(view.live))]

    def aggregate(self, view: PoolView) -> Any:
        return SelfConsistency.aggregate(VOTE, view)


@dataclass(frozen=True)
class Raising(Endless):
    name: ClassVar[str] = "raising"

    def step(self, view: PoolView) -> list[Action]:
        return self.give_up()

    def give_up(self) -> list[Action]:
        raise ZeroDivisionError("no way on")


@dataclass(frozen=True)
class Stuck(Endless):
    """Thinks for ever, in Python, until the test lets it go."""

    name: ClassVar[str] = "stuck"
    thinks: threading.Event = field(default_factory=threading.Event)
    go: threading.Event = field(default_factory=threading.Event)

    def step(self, view: PoolView) -> list[Action]:
        self.thinks.set()
        while not self.go.is_set():
            pass
        raise ZeroDivisionError("let go")


@dataclass(frozen=True)
class EndlessTree(Rebase):
    """Asks for another child of the question, whatever came of the others."""

    name: ClassVar[str] = "endless_tree"

    def ready(self, tree: Tree) -> list[Expand]:
        return [Expand(tree.root, len(tree.grown) - 1)]

    def done(self, tree: Tree) -> bool:
        return False


def test_one_prompt_has_a_result_and_several_have_a_list(llm: LLM):
    one = llm.search(PROMPT, VOTE)
    many = llm.search([PROMPT, OTHER], VOTE)
    assert isinstance(one, Result) and isinstance(many, list)
    assert many[0].answer == one.answer and many[0].distribution == one.distribution
    assert [r.ledger.prefill for r in many] == [7, 7]
    assert llm.search([PROMPT], VOTE)[0].answer == one.answer
    assert llm.tokenizer is not None
    ids = llm.tokenizer.encode(PROMPT)
    assert llm.search(ids, VOTE).answer == one.answer
    assert llm.search({"prompt_token_ids": ids}, VOTE).distribution == one.distribution


def test_seeds_tell_searches_apart_and_repeat(llm: LLM):
    first, again, other = (llm.search(PROMPT, VOTE, seed=seed) for seed in (0, 0, 1))
    texts = [[piece.text for piece in found.tree] for found in (first, again, other)]
    assert texts[0] == texts[1] != texts[2]


def test_answers_are_read_as_the_caller_says(llm: LLM):
    found = llm.search(PROMPT, VOTE, read=lambda text: text.count("|"))
    assert found.answer == 4


def test_questions_of_a_task(llm: LLM):
    task = make_task("modchain", {})
    problems = distinct(task, "dev", 0, 12)
    words = llm.tokenizer
    assert words is not None
    questions = [question_of(task, p, words, max_tokens=64) for p in problems]
    found = llm.search(questions, HyPER(), Budget(tokens=2000))
    right = sum(r.answer == task.answer(p) for p, r in zip(problems, found, strict=True))
    assert right >= 8  # of its dev split HyPER solves nine in ten
    alone = llm.search(questions[3], HyPER(), Budget(tokens=2000))
    assert isinstance(alone, Result)
    assert alone.answer == found[3].answer


@pytest.mark.parametrize("name", CONTROLLERS)
def test_every_controller_has_an_answer(llm: LLM, name: str):
    found = llm.search(PROMPT, CONTROLLERS[name](), Budget(tokens=600), step="|")
    assert found.answer is not None
    assert found.ledger.generated == found.ledger.committed + found.ledger.spec_waste
    assert found.ledger.committed > 0


@pytest.mark.parametrize("name", ["mcts", "best-first", "rebase", "dvts"])
def test_speculation_is_lossless(llm: LLM, name: str):
    eager = Speculator(floor=0.0, slack=1.5, unscored=True)
    llm.searches.trust.rows.clear()  # or it may know by now that guesses come to nothing
    asked, ahead = [PROMPT, OTHER], 0
    plain = llm.search(asked, CONTROLLERS[name](), step="|")
    fast = llm.search(asked, CONTROLLERS[name](), step="|", spec=eager)
    for a, b in zip(plain, fast, strict=True):
        assert (b.answer, b.distribution) == (a.answer, a.distribution)
        assert b.ledger.committed == a.ledger.committed
        ahead += b.ledger.spec_hit + b.ledger.spec_waste
    assert ahead > 0 or name not in ("mcts", "best-first"), "nothing was guessed, and nothing shown"


def test_events_are_told_as_they_happen(llm: LLM):
    heard = list[Event]()
    found = llm.search(PROMPT, VOTE, on_event=heard.append)
    steps = [e for e in heard if isinstance(e, StepDone)]
    assert sum(len(e.step.tokens) for e in steps) == found.ledger.committed


def test_a_notebook_has_a_loop_already(llm: LLM):
    async def cell() -> Any:
        return llm.search(PROMPT, VOTE)

    assert asyncio.run(cell()).answer == llm.search(PROMPT, VOTE).answer


def test_a_search_can_be_awaited_and_cancelled(llm: LLM):
    async def server() -> Any:
        question = llm.searches.question(PROMPT)
        running = llm.searches.start([question], VOTE)
        (found,) = await running.aresult()
        endless = llm.searches.start([question], Endless())
        await asyncio.sleep(0.05)
        endless.cancel()
        with pytest.raises(Cancelled):
            await endless.aresult()
        return found

    assert asyncio.run(server()).answer == llm.search(PROMPT, VOTE).answer


def test_an_interrupt_cancels_and_the_engine_goes_on(llm: LLM):
    with interrupted(lambda: llm.stats().num_running):
        llm.search([PROMPT, OTHER], Endless())
    assert llm.drain(10)
    assert llm.search(PROMPT, VOTE).answer is not None


def test_an_interrupt_while_it_begins_cancels_too(llm: LLM, monkeypatch: pytest.MonkeyPatch):
    """The thread is on its way, and `start` has not come back: as where the machine is busy."""
    begin = threading.Thread.start

    def start(thread: threading.Thread) -> None:
        begin(thread)
        if thread.name == "jaxserve-search":
            wait_until(lambda: llm.stats().num_running)
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        with pytest.raises(KeyboardInterrupt):
            llm.search(PROMPT, Endless())
    wait_until(lambda: not any(t.name == "jaxserve-search" for t in threading.enumerate()))


def test_a_controller_that_raises_fails_alone(llm: LLM):
    found = dict[str, Any]()

    def other() -> None:
        found["other"] = llm.search(PROMPT, SelfConsistency(paths=12), seed=5)

    thread = threading.Thread(target=other)
    thread.start()
    with pytest.raises(SearchError, match="no way on") as caught:
        llm.search(PROMPT, Raising())
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert "give_up" in "".join(traceback.format_exception(caught.value)), "who raised is shown"
    thread.join(30)
    assert found["other"].answer == llm.search(PROMPT, SelfConsistency(paths=12), seed=5).answer


@dataclass(frozen=True)
class Looping(SelfConsistency):
    """Loops for ever after its first round."""

    name: ClassVar[str] = "looping"

    def step(self, view: PoolView) -> list[Action]:
        while True:
            pass


def test_a_controller_that_never_returns_fails_alone(llm: LLM):
    """Beside it another search comes to what it would alone, and requests are served."""
    alone = llm.search(PROMPT, SelfConsistency(paths=12), seed=5)
    question = llm.searches.question(PROMPT)
    running = llm.searches.start([question], Looping(), Budget(decision=8.0))
    time.sleep(0.2)
    found = llm.search(PROMPT, SelfConsistency(paths=12), seed=5)
    (text,) = llm.generate(PROMPT, SamplingParams(max_tokens=4, temperature=0))
    assert not running.over, "it is stuck all the while"
    with pytest.raises(SearchError, match="looping has not decided within 8 s, and"):
        running.result(30)
    assert (found.answer, found.distribution) == (alone.answer, alone.distribution)
    assert len(text.outputs[0].token_ids) == 4


def test_a_controller_that_never_returns_can_be_cancelled(llm: LLM):
    question = llm.searches.question(PROMPT)
    running = llm.searches.start([question], Looping(), Budget(decision=0.5))
    time.sleep(0.1)
    running.cancel()
    with pytest.raises((Cancelled, SearchError)):
        running.result(30)


@pytest.mark.parametrize(
    ("change", "param"), [({"prompt": (3, 31)}, "prompt"), ({"step": (-1,)}, "step")]
)
def test_ids_that_are_no_token_are_refused(llm: LLM, change: dict[str, Any], param: str):
    question = replace(llm.searches.question(PROMPT), **change)
    with pytest.raises(RequestError, match=r"token (31|-1); ids go from 0 to 30") as caught:
        llm.search(question, VOTE)
    assert caught.value.param == param


def test_a_suffix_that_is_no_token_is_refused(llm: LLM):
    with pytest.raises(
        RequestError,
        match=r"suffix of a probe holds token 4000; ids go from 0 to 30\. It is number 1;",
    ) as caught:
        llm.search(PROMPT, Certaindex((3, 4000), paths=2, period=2))
    assert caught.value.param == "suffix"

    @dataclass(frozen=True)
    class Own(Certaindex):
        """Asks with a suffix that nobody can see beforehand."""

        def step(self, view: PoolView) -> list[Action]:
            return [Probe(p.node, (99,), 2) for p in view.live]

    with pytest.raises(RequestError, match="holds token 99"):
        llm.search(PROMPT, Own(paths=2, period=2))


def test_a_tree_policy_that_raises_is_named(llm: LLM):
    @dataclass(frozen=True)
    class Bad(Rebase):
        name: ClassVar[str] = "bad"

        def observe(self, tree: Tree, grown: Any) -> None:
            raise KeyError("left")

    with pytest.raises(SearchError, match="bad: KeyError: 'left'") as caught:
        llm.search([PROMPT, OTHER], Bad(), step="|")
    assert isinstance(caught.value.__cause__, KeyError)
    kept = llm.search([PROMPT, OTHER], Bad(), step="|", return_exceptions=True)
    assert [type(error) for error in kept] == [SearchError, SearchError]


@pytest.mark.parametrize("controller", [Endless(), EndlessTree()], ids=["pool", "tree"])
@pytest.mark.parametrize("budget", [Budget(tokens=150), Budget(paths=5), Budget(seconds=0.3)])
def test_one_that_never_ends_has_a_result_for_its_budget(llm: LLM, controller: Any, budget: Budget):
    found = llm.search(PROMPT, controller, budget, step="|")
    assert found.stopped == "budget"
    assert found.ledger.committed > 0


def test_one_that_thinks_for_ever_holds_nobody_else_up(llm: LLM):
    stuck, ended = Stuck(), list[BaseException]()

    def wait() -> None:
        try:
            llm.search(PROMPT, stuck)
        except BaseException as error:
            ended.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    try:
        assert stuck.thinks.wait(10)
        alone = llm.search(PROMPT, VOTE)
        assert alone.answer is not None
        (output,) = llm.generate(PROMPT, SamplingParams(max_tokens=8))
        assert len(output.outputs[0].token_ids) == 8
        assert not ended
        assert not llm.drain(0.1), "it runs, though nothing of it is on its way"
        with pytest.raises(EngineError, match="a search is running"):
            llm.sleep()
    finally:
        stuck.go.set()
    thread.join(10)
    assert isinstance(ended[0].__cause__, ZeroDivisionError)


@pytest.mark.parametrize(
    "controller, scorer, scored",
    [
        (VOTE, None, False),
        (VOTE, "prm", True),
        (HyPER(), None, False),
        (HyPER(trust=1.0), None, True),
        (BestOfN(paths=3), None, True),
    ],
)
def test_paths_are_scored_for_those_who_look(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, controller: Any, scorer: str | None, scored: bool
):
    judge, judged = Runner._judge, list[Any]()

    def note(runner: Runner, launched: Any) -> Any:
        judged.append(launched)
        return judge(runner, launched)

    monkeypatch.setattr(Runner, "_judge", note)
    found = llm.search(PROMPT, controller, scorer=scorer)
    assert bool(judged) == scored, "the head reads what nobody asks about, or does not"
    ended = [piece.score for piece in found.tree if piece.state == "finished"]
    assert ended and all((score is not None) == scored for score in ended)


def test_a_scorer_of_ones_own(llm: LLM):
    async def short(pool: Any, node: Any) -> float:
        return 1 / (1 + pool.stats(node).n_tokens)

    llm.searches.scorers["short"] = short
    try:
        found = llm.search(PROMPT, BestOfN(paths=5), scorer="short")
    finally:
        del llm.searches.scorers["short"]
    scored = [piece for piece in found.tree if piece.score is not None]
    assert len(scored) == 5
    assert all(piece.score == 1 / (1 + len(piece.tokens)) for piece in scored)
    with pytest.raises(RequestError, match="confidence, prm"):
        llm.search(PROMPT, BestOfN(), scorer="short")


def test_a_scorer_that_fails_fails_its_search(llm: LLM):
    async def broken(pool: Any, node: Any) -> float:
        raise OSError("no line to the judge")

    llm.searches.scorers["broken"] = broken
    try:
        with pytest.raises(OSError, match="no line"):
            llm.search(PROMPT, BestOfN(), scorer="broken")
        with pytest.raises(SearchError, match="no line"):
            llm.search(PROMPT, Rebase(), scorer="broken", step="|")
    finally:
        del llm.searches.scorers["broken"]


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"controller": object()}, "controller"),
        ({"controller": VOTE, "spec": Speculator()}, "spec"),
        ({"controller": VOTE, "scorer": "nobody"}, "scorer"),
        ({"controller": Rebase()}, "step"),
        ({"controller": Rebase(), "step": "| |"}, "step"),
        ({"controller": VOTE, "max_tokens": 0}, "max_tokens"),
        ({"controller": VOTE, "max_tokens": 400}, "max_tokens"),
        ({"controller": VOTE, "prompts": []}, None),
        ({"controller": VOTE, "prompts": [[]]}, "prompt"),
        ({"controller": VOTE, "prompts": [99999]}, "prompt"),
    ],
)
def test_mistakes_are_named(llm: LLM, asked: dict[str, Any], param: str | None):
    asked = {"prompts": PROMPT} | asked
    if param is None:
        assert llm.search(**asked) == []
        return
    with pytest.raises(RequestError) as caught:
        llm.search(**asked)
    assert caught.value.param == param


def test_settings_are_checked_against_their_types():
    made = controller_of("rebase", {"width": 4, "gen": {"max_tokens": 9}})
    assert made == Rebase(width=4, gen=made.gen) and made.gen.max_tokens == 9
    for name in CONTROLLERS:
        assert controller_of(name) == CONTROLLERS[name]()


@pytest.mark.parametrize(
    "wrong",
    [{"max_tokens": 0}, {"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0},
     {"topk_logprobs": 0}],
)  # fmt: skip
def test_extensions_that_cannot_be_are_refused_where_they_are_made(wrong: dict[str, Any]):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        replace(Gen(5), **wrong)


def test_threads_that_begin_together_share_one_keeper():
    with LLM(MODEL, progress=False, max_model_len=64, num_pages=16) as llm:
        found = list[Any]()
        threads = [
            threading.Thread(target=lambda: found.append(llm.searches.keeper)) for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 8 and len(set(map(id, found))) == 1


def test_a_vote_of_nobody_is_no_answer(llm: LLM):
    found = llm.search(PROMPT, VOTE, max_tokens=2, read=lambda text: None)
    assert found.answer is None and found.tokens == ()
    assert vote([]).answer is None
