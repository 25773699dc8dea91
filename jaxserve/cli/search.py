"""search: think about a question with a search controller, and show the tree of what was thought

With `--task` the questions are problems of a task with known answers, and the last line says how
many were solved; otherwise the question is a prompt.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from jaxserve.cli.options import add_engine_options, load
from jaxserve.errors import RequestError
from reasoning.controllers import CONTROLLERS
from reasoning.result import Budget, Result
from reasoning.speculation import Speculator
from reasoning.tasks import TASKS, Problem, Task, distinct, make_task

if TYPE_CHECKING:
    from rich.console import Console

T = TypeVar("T")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declares the options of this command."""
    parser.add_argument("model", help="a folder with a Hugging Face checkpoint, or a hub id")
    parser.add_argument("prompt", nargs="?", help="the question; left out with --task")
    parser.add_argument(
        "--controller", default="hyper", metavar="NAME", help=f"one of {', '.join(CONTROLLERS)}"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", dest="settings",
        help="a setting of the controller, as --set width=8; repeatable",
    )  # fmt: skip
    parser.add_argument(
        "--task", metavar="NAME", help=f"draw problems of a task: {', '.join(TASKS)}"
    )
    parser.add_argument("--problems", type=int, default=1, help="how many")
    parser.add_argument("--split", choices=("dev", "test"), default="dev", help="of them")
    parser.add_argument("--tokens", type=int, default=4096, help="budget of a question")
    parser.add_argument("--step", help="text of the token that closes a step; else an empty line")
    parser.add_argument("--max-tokens", type=int, default=None, help="most tokens of a path")
    parser.add_argument(
        "--scorer",
        help="of paths: prm (if there is a head), confidence, certainty, self-evaluation; oracle: "
        "whether the steps of a task's problem are right",
    )  # fmt: skip
    parser.add_argument(
        "--ask", nargs=3, metavar=("QUESTION", "YES", "NO"),
        help="score paths by how likely the model answers YES rather than NO, a token each",
    )  # fmt: skip
    parser.add_argument(
        "--scorer-model", metavar="MODEL", help="another model, whose reward head scores paths"
    )
    parser.add_argument(
        "--scorer-latency", type=float, default=0.0, metavar="SECONDS",
        help="by which its scores come later than they could",
    )  # fmt: skip
    parser.add_argument(
        "--speculate", choices=("lossless", "paper", "opportunistic"),
        help="run ahead of a tree search (SPEX), in this mode",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object a question")
    add_engine_options(parser)


def run(args: argparse.Namespace) -> None:
    """Searches, and shows what came of it."""
    from rich.console import Console

    if (args.prompt is None) == (args.task is None):
        raise RequestError("give either a prompt or --task", "prompt")
    controller = _controller(args)
    budget = _or_refuse("tokens", lambda: Budget(tokens=args.tokens))
    spec = Speculator(mode=args.speculate) if args.speculate else None
    console = Console(highlight=False)
    task = None if args.task is None else _task(args.task, Path(args.model))
    problems = [] if task is None else _problems(task, args)
    args.enable_route_noise |= _refines(controller)
    args.progress &= not args.json  # bars leave a line behind
    with load(args) as llm, _scorer(args, llm, task, problems) as scorer:
        options = {"budget": budget, "spec": spec, "scorer": scorer}
        if task is None:
            ways = {"step": args.step, "max_tokens": args.max_tokens, "seed": args.seed}
            found = llm.search(args.prompt, controller, **options, **ways)
            _show(args, console, llm, [found])
        else:
            _solve(args, console, llm, controller, task, problems, options)


def _solve(
    args: argparse.Namespace,
    console: Console,
    llm: Any,
    controller: Any,
    task: Task,
    problems: Sequence[Problem],
    options: dict[str, Any],
) -> None:
    """Problems of a task, all at once."""
    from reasoning.questions import question_of

    length = args.max_tokens or llm.max_model_len // 2
    questions = [
        question_of(task, p, llm.tokenizer, seed=args.seed, max_tokens=length) for p in problems
    ]
    results: list[Result] = llm.search(questions, controller, **options)
    right = [_is_right(task, p, r, llm) for p, r in zip(problems, results, strict=True)]
    verdicts = [
        "right" if ok else f"wrong, it is {task.answer(problem)}"
        for ok, problem in zip(right, problems, strict=True)
    ]
    _show(args, console, llm, results, problems, verdicts)
    if not args.json:
        tokens = sum(r.ledger.generated for r in results) / len(results)
        console.print(f"\n{sum(right)} of {len(right)} solved, {tokens:.0f} tokens each")


def _is_right(task: Task, problem: Problem, result: Result, llm: Any) -> bool:
    """Whether the answer is the right one and, where a task asks for that, was derived."""
    grade = task.grade(problem, llm.tokenizer.decode(result.tokens))
    return grade.correct and grade.answer == result.answer


def _show(
    args: argparse.Namespace,
    console: Console,
    llm: Any,
    results: Sequence[Result],
    problems: Sequence[Problem] = (),
    verdicts: Sequence[str] = (),
) -> None:
    """Results one by one; their trees too, unless there are many."""
    from rich.text import Text

    for i, result in enumerate(results):
        asked = problems[i].prompt if problems else args.prompt
        if args.json:
            verdict = {"correct": verdicts[i] == "right"} if verdicts else {}
            said = {"prompt": asked, "text": llm.tokenizer.decode(result.tokens)}
            print(json.dumps({**said, **plain(result), **verdict}, ensure_ascii=False))
            continue
        if problems:
            colour = "green" if verdicts[i] == "right" else "red"
            line = Text.assemble(f"{asked} {result.answer} ", (f"({verdicts[i]})", colour))
            if len(results) > 3:
                line.append(f"  {result.ledger.generated} tokens", style="dim")
            console.print(line)
        if len(results) <= 3:
            console.print(result)


def plain(result: Result) -> dict[str, Any]:
    """What JSON can say of a result; answers become text."""
    ledger = dataclasses.asdict(result.ledger) | {"generated": result.ledger.generated}
    return {
        "answer": None if result.answer is None else str(result.answer),
        "distribution": {str(answer): w for answer, w in result.distribution.items()},
        "controller": result.controller,
        "mode": result.mode,
        "stopped": result.stopped,
        "ledger": ledger,
        "notes": dict(result.notes),
    }


def _controller(args: argparse.Namespace) -> Any:
    from jaxserve.searches import controller_of  # an engine's, so not at the top

    settings = dict[str, Any]()
    for setting in args.settings:
        name, _, value = setting.partition("=")
        try:
            settings[name] = json.loads(value)
        except ValueError:
            settings[name] = value
    return controller_of(args.controller, settings)


@contextmanager
def _scorer(
    args: argparse.Namespace, llm: Any, task: Task | None, problems: Sequence[Problem]
) -> Iterator[Any]:
    """What scores paths, for as long as it is wanted."""
    from jaxserve.llm import LLM
    from jaxserve.paths.scorers import Oracle
    from jaxserve.request import Asked
    from reasoning.step_labels import step_oracle

    if args.scorer_latency < 0:
        raise RequestError("scorer_latency must be at least 0", "scorer_latency")
    if len([way for way in (args.scorer, args.scorer_model, args.ask) if way is not None]) > 1:
        raise RequestError("give one of --scorer, --scorer-model and --ask", "scorer")
    if args.ask is not None:
        yield Asked(*args.ask)
    elif args.scorer_model is not None:
        with LLM(args.scorer_model, progress=args.progress) as judge:
            yield judge.searches.as_scorer(llm.searches, latency=args.scorer_latency)
    elif args.scorer == "oracle":
        if task is None:
            raise RequestError("scorer=oracle needs --task: it knows nothing else", "scorer")
        yield Oracle(step_oracle(task, problems), args.scorer_latency)
    else:
        yield args.scorer


def _refines(controller: Any) -> bool:
    """Whether it needs programs that the engine has only if they are asked for."""
    from jaxserve.searches import routes_of

    return any(route.K > 1 for route in routes_of(controller).values())


def _task(name: str, folder: Path) -> Task:
    """The task, with the settings that the model was trained on if they are known."""
    recipe, settings = folder / "recipe.toml", dict[str, Any]()
    if recipe.is_file():
        data = tomllib.loads(recipe.read_text()).get("data", {})
        settings = data.get("settings", {}) if data.get("task") == name else {}
    return _or_refuse("task", lambda: make_task(name, settings))


def _problems(task: Task, args: argparse.Namespace) -> list[Problem]:
    if args.problems < 1:
        raise RequestError(f"problems={args.problems} must be at least 1", "problems")
    return _or_refuse("problems", lambda: distinct(task, args.split, args.seed, args.problems))


def _or_refuse(what: str, make: Callable[[], T]) -> T:
    """What `make` makes; its ValueError as an error of one line."""
    try:
        return make()
    except ValueError as error:
        raise RequestError(str(error), what) from None
