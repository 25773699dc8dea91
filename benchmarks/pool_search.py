"""Controllers of pools against each other on recorded paths: accuracy at matched tokens.

    python -m benchmarks.path_bank models/modchain-moe --problems 400 --paths 128
    python -m benchmarks.pool_search runs/paths/modchain-moe-dev.npz --seeds 2

A replay says what a rule is worth, not what the engine gives: branches go on as other recorded
paths did, and a plain vote has no more paths than were recorded. `--wrong 0.1` asks a perfect
student instead, of problems in which that share of products is taught wrongly.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from benchmarks import search_stats as stats
from benchmarks.path_bank import Bank
from benchmarks.replay import Ideal, Language, Recorded, Replay
from benchmarks.search_stats import Runs
from jaxserve.protocol import Question
from reasoning.controllers.adaptive_consistency import AdaptiveConsistency
from reasoning.controllers.best_of_n import BestOfN
from reasoning.controllers.deepconf import DeepConf
from reasoning.controllers.esc import EarlyStopping
from reasoning.controllers.hyper import HyPER
from reasoning.controllers.self_consistency import SelfConsistency
from reasoning.controllers.slim_sc import SlimSC
from reasoning.pool import PoolPolicy, run_pool
from reasoning.result import Budget
from reasoning.tasks import ModChain, distinct

LENGTH = 35  # tokens of every whole path of a ModChain of five
BUDGETS = (4, 8, 16, 32, 64)

Asked = tuple[Callable[[], Replay], Question, str]

METHODS: Mapping[str, Callable[[int], PoolPolicy]] = {
    "self-consistency": lambda n: SelfConsistency(paths=n),
    "best-of-n": lambda n: BestOfN(paths=n),
    "confidence vote": lambda n: BestOfN(paths=n, choose="vote"),
    "adaptive": lambda n: AdaptiveConsistency(paths=n),
    "esc": lambda n: EarlyStopping(paths=n),
    "slim-sc": lambda n: SlimSC(paths=n, similar=0.95, window=16, delay=10, period=5),
    "deepconf": lambda n: DeepConf(
        paths=n if n <= 16 else 2 * n, keep=0.3, window=1, period=4, batch=1
    ),
    "deepconf, floor": lambda n: DeepConf(paths=2 * n, floor=3.5, window=1, period=4, batch=1),
    "hyper": lambda n: HyPER(),
    "hyper, no states": lambda n: HyPER(alike=0),
    "hyper, no supports": lambda n: HyPER(support=0),
    "hyper, no branches": lambda n: HyPER(novelty=2.0, width=n),
}


def recorded(bank: Bank, seed: int, count: int) -> Iterator[Asked]:
    """Questions of a bank, with the right answers."""
    language = Language.of(bank)
    for q in range(min(count, len(bank.prompts))):
        question = language.question(str(bank.prompts[q]), seed)
        source = Recorded(bank, q, seed, language.state)
        yield (lambda source=source: Replay(source)), question, str(bank.right[q])


def ideal(wrong: float, seed: int, count: int) -> Iterator[Asked]:
    """Questions to a perfect student of a chain with that share of wrong products."""
    task, language = ModChain(wrong=wrong), Language.of(None)
    for problem in distinct(task, "dev", 0, count):
        source = Ideal(task, problem, seed)
        question = language.question(problem.prompt, seed)
        yield (lambda source=source: Replay(source)), question, task.answer(problem)


def run(policy: PoolPolicy, asked: Sequence[Asked], tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Which questions were answered rightly, and what each cost [Q]."""

    async def all_of_them() -> list[tuple[bool, float]]:
        results = list[tuple[bool, float]]()
        for pool, question, right in asked:
            result = await run_pool(policy, pool(), question, Budget(tokens=tokens))
            results.append((result.answer == right, result.notes["spent"]))
        return results

    right, spent = zip(*asyncio.run(all_of_them()), strict=True)
    return np.array(right, float), np.array(spent)


def runs(make: Callable[[int], PoolPolicy], asked: Sequence[Sequence[Asked]]) -> Runs:
    """One method at every budget, for each seed."""
    cells = [[run(make(n), questions, n * LENGTH) for questions in asked] for n in BUDGETS]
    arrays = np.array(cells)  # [B, S, 2, Q]
    return Runs(arrays[:, :, 0].swapaxes(1, 2), arrays[:, :, 1].swapaxes(1, 2))


def table(methods: Mapping[str, Runs], ours: str = "hyper") -> str:
    """Accuracy and tokens at each budget, and how `ours` differs, with 95 % intervals."""
    costs = [n * LENGTH for n in BUDGETS]
    lines = ["| method | " + " | ".join(f"{n} paths" for n in BUDGETS) + " | fewer tokens |"]
    lines.append("|---" * (len(BUDGETS) + 2) + "|")
    found = stats.compare(methods, ours, costs)
    names = list(methods)
    curves = dict(zip(names, stats.bootstrap(list(methods.values())), strict=True))
    p = {
        f"{other} {what}": d.p for other, tests in found.items() for what, d in tests.items()
    }  # one family
    adjusted = stats.holm(p)
    for name in names:
        tokens, accuracy = stats.curve(methods[name])
        cells = [f"{a:.3f} ({t:.0f})" for t, a in zip(tokens, accuracy, strict=True)]
        lines.append(f"| {name} | {' | '.join(cells)} | |")
    for other, tests in found.items():
        cells = [
            f"{100 * d.value:+.1f} ({100 * d.low:+.1f} to {100 * d.high:+.1f})"
            + ("" if adjusted[f"{other} {what}"] < 0.05 else " n.s.")
            for what, d in tests.items()
            if what != "area"
        ]
        saved = stats.fewer_tokens(curves[ours], curves[other], len(BUDGETS) - 1)
        cells.append(f"{saved.value:.0%} ({saved.low:.0%} to {saved.high:.0%})")
        lines.append(f"| {ours} less {other} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bank", type=Path, nargs="?")
    parser.add_argument("--wrong", type=float, help="ask a perfect student instead")
    parser.add_argument("--problems", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS))
    args = parser.parse_args()
    if (args.bank is None) == (args.wrong is None):
        parser.error("give a bank, or --wrong")
    bank = None if args.bank is None else Bank.load(args.bank)
    asked = [
        list(
            ideal(args.wrong, seed, args.problems)
            if bank is None
            else recorded(bank, seed, args.problems)
        )
        for seed in range(args.seeds)
    ]
    methods = dict[str, Runs]()
    for name in args.methods:
        methods[name] = runs(METHODS[name], asked)
        print(name, *stats.curve(methods[name]), flush=True)
    print(table(methods))


if __name__ == "__main__":
    main()
