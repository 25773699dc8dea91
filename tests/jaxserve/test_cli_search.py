"""`jaxserve search`: on a shipped model, for people, for programs, and with mistakes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jaxserve.cli import main, search
from jaxserve.llm import LLM

MODEL = str(Path(__file__).parents[2] / "models/modchain-moe")
PROMPT = "12 9 2 4 5 :"


class Kept:
    """A model for one command after another: leaving it does not shut it down."""

    def __init__(self, llm: LLM):
        self._llm = llm

    def __getattr__(self, name: str) -> Any:
        return getattr(self._llm, name)

    def __enter__(self) -> Kept:
        return self

    def __exit__(self, *_: object) -> None: ...


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(MODEL, progress=False, enable_route_noise=True, max_num_batched_tokens=64) as llm:
        llm.wait_until_warm()
        yield llm
        assert llm.stats().num_free_pages == llm.stats().num_pages


@pytest.fixture(autouse=True)
def one_model(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "load", lambda args: Kept(llm))
    monkeypatch.setenv("COLUMNS", "80")


def said(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    assert main(["search", MODEL, *args]) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    assert main(["search", MODEL, *args]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ") and shown.err.count("\n") == 1
    return shown.err


def test_a_problem_is_answered_and_its_search_is_shown(capsys: pytest.CaptureFixture[str]):
    shown = said(capsys, "--controller", "hyper", "--task", "modchain", "--seed", "1")
    assert "% of the vote): hyper, " in shown
    assert "committed" in shown and "━" in shown
    assert "question\n├── " in shown and "finished" in shown
    assert "(right)" in shown or "(wrong, it is " in shown
    assert shown.rstrip().splitlines()[-1].startswith(("1 of 1 solved", "0 of 1 solved"))


@pytest.mark.parametrize("columns", [80, 120])
def test_lines_fit_into_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: int
):
    monkeypatch.setenv("COLUMNS", str(columns))
    shown = said(capsys, "--controller", "hyper", "--task", "modchain").splitlines()
    assert max(map(len, shown)) <= columns
    tree = shown[shown.index("question") + 1 : -2]
    assert all(line[:4] in ("├── ", "└── ", "│   ", "    ") for line in tree), "a piece, a line"


def test_speculation_and_settings(capsys: pytest.CaptureFixture[str]):
    rebase = ["--controller", "rebase", "--task", "modchain", "--set", "width=8", "--json"]
    plain = json.loads(said(capsys, *rebase))
    ahead = json.loads(said(capsys, *rebase, "--speculate", "lossless"))
    assert (plain["mode"], ahead["mode"]) == ("off", "lossless")
    for same in ("answer", "distribution", "text", "correct"):
        assert ahead[same] == plain[same]
    assert ahead["ledger"]["committed"] == plain["ledger"]["committed"]
    assert 0 < len(plain["distribution"]) <= 8


def test_refined_tokens_have_the_engine_started_for_them(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, llm: LLM
):
    asked = list[bool]()

    def load(args: Any) -> Kept:
        asked.append(args.enable_route_noise)
        return Kept(llm)

    monkeypatch.setattr(search, "load", load)
    beam = ["--controller", "beam", "--task", "modchain", "--json"]
    plain = json.loads(said(capsys, *beam))
    noise = '{"max_tokens": 64, "route": {"K": 3, "entropy_gate": 0, "spared": 0}}'
    refined = json.loads(said(capsys, *beam, "--set", f"gen={noise}"))
    assert asked == [False, True]
    assert plain["ledger"]["effective"] == 0 < refined["ledger"]["effective"]


def test_several_problems_are_a_line_each(capsys: pytest.CaptureFixture[str]):
    shown = said(capsys, "--task", "modchain", "--problems", "5", "--split", "test")
    lines = [line for line in shown.splitlines() if line]
    assert len(lines) == 6
    assert all(" tokens" in line and " : " in line for line in lines[:-1])
    assert " of 5 solved, " in lines[-1]


def test_json_is_an_object_a_question(capsys: pytest.CaptureFixture[str]):
    shown = said(capsys, "--task", "modchain", "--problems", "2", "--json")
    first, second = map(json.loads, shown.splitlines())
    assert first["prompt"] != second["prompt"]
    assert first["text"].endswith(f"; {first['answer']} |")
    assert isinstance(first["correct"], bool)
    assert first["controller"] == "hyper"
    ledger = first["ledger"]
    assert ledger["generated"] == ledger["committed"] + ledger["spec_waste"]


def test_a_prompt_with_steps(capsys: pytest.CaptureFixture[str]):
    shown = json.loads(said(capsys, PROMPT, "--step", "|", "--controller", "beam", "--json"))
    assert shown["prompt"] == PROMPT and "correct" not in shown
    assert shown["text"].count("|") == 4
    shown = said(capsys, PROMPT, "--controller", "self-consistency", "--max-tokens", "7")
    assert "self-consistency, done, 112 tokens" in shown


def test_a_budget_and_a_scorer(capsys: pytest.CaptureFixture[str]):
    few = ["--controller", "best-of-n", "--scorer", "confidence", "--tokens", "60", "--json"]
    shown = json.loads(said(capsys, PROMPT, *few))
    assert shown["stopped"] == "budget" and shown["ledger"]["generated"] <= 60


@pytest.mark.slow
def test_scorers_that_are_made_for_it(capsys: pytest.CaptureFixture[str]):
    task = ["--task", "modchain", "--problems", "20", "--controller", "rebase", "--json"]

    def run(*more: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in said(capsys, *task, *more).splitlines()]

    own, far = run(), run("--scorer-model", MODEL, "--scorer-latency", "0.001")
    assert [r["answer"] for r in far] == [r["answer"] for r in own]
    assert all(r["ledger"]["scorer"] > 0 for r in far)
    asked = run("--ask", "|", "4", "9")
    assert all(r["ledger"]["scorer"] > 0 for r in asked)
    knowing, unsure = run("--scorer", "oracle"), run("--scorer", "confidence")
    assert sum(r["correct"] for r in knowing) > sum(r["correct"] for r in unsure)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ([PROMPT, "--controller", "nobody"], "controller 'nobody' is not known; there are "),
        (
            [PROMPT, "--controller", "rebase", "--set", "wide=2"],
            "no setting 'wide' in settings; it has",
        ),
        ([PROMPT, "--controller", "rebase", "--set", "width=x"], "settings.width: Expected `int`"),
        ([PROMPT, "--controller", "rebase", "--set", "width"], "settings.width: Expected `int`"),
        ([PROMPT, "--controller", "rebase", "--set", "width=0"], "must be positive"),
        ([PROMPT, "--set", 'route={"K": 0}'], "K must be a whole number, 1 to 64"),
        (["--task", "chess"], "task 'chess' is not known; there are modchain"),
        ([PROMPT, "--task", "modchain"], "give either a prompt or --task"),
        ([], "give either a prompt or --task"),
        (["--task", "modchain", "--problems", "0"], "problems=0 must be at least 1"),
        ([PROMPT, "--tokens", "0"], "must be positive"),
        ([PROMPT, "--controller", "beam"], "is 0 tokens of this model, and must be one"),
        ([PROMPT, "--controller", "beam", "--step", "1 2"], "step='1 2' is 2 tokens"),
        ([PROMPT, "--scorer", "nobody"], "scorer='nobody' is not known to this model"),
        ([PROMPT, "--scorer", "oracle"], "scorer=oracle needs --task"),
        (
            [PROMPT, "--scorer", "prm", "--scorer-model", MODEL],
            "one of --scorer, --scorer-model",
        ),
        ([PROMPT, "--ask", "| 4", "|", "|"], "both answers must be one token, and different"),
        ([PROMPT, "--scorer", "self-evaluation"], "give words of its vocabulary"),
        ([PROMPT, "--scorer-latency", "-1"], "scorer_latency must be at least 0"),
        ([PROMPT, "--speculate", "lossless"], "hyper grows a pool"),
        ([PROMPT, "--max-tokens", "999"], "max_tokens=999"),
    ],
)
def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str], args: list[str], says: str):
    assert says in refused(capsys, *args)


def test_an_unknown_mode_is_a_mistyped_option(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as caught:
        main(["search", MODEL, PROMPT, "--speculate", "wild"])
    assert caught.value.code == 2
    assert "opportunistic" in capsys.readouterr().err
