"""What eight bits cost on models of ours: `python -m benchmarks.quant_eval models/modchain-moe`.

A model in float32 is compared with itself in W8A8, rounded to the nearest ("plain"), with all of
the measures ("calibrated"), and with all but one of them. Everything runs in the engine, on
held-out problems of the task that the model's `recipe.toml` names, and every comparison is paired:

    perplexity      of the task's own solutions, by the log-probabilities of their tokens
    drift           root mean square change of those log-probabilities, in thousandths of a nat:
                    it sees what is too small to move the others
    greedy pass@1   share of problems that are solved at temperature 0
    sampled pass@1  the same at temperature 1, where both draw the same random numbers

All but the drift are relative differences from float32 in percent; intervals are 95 % bootstraps
over problems. Calibration reads what the model itself writes behind its `examples.json`.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from benchmarks.reason_eval import interval, task_of
from benchmarks.records import record, write
from jaxserve.cli.quantize import own_text
from jaxserve.quant import PLAIN, QuantizeConfig, quantize_checkpoint
from jaxserve.quant.config import MEASURES
from reasoning.tasks import Problem, Task
from reasoning.tasks import problems as problems_of

CALIBRATED = QuantizeConfig()
VARIANTS: dict[str, QuantizeConfig] = {
    "plain": PLAIN,
    "calibrated": CALIBRATED,
    **{f"without {m}": dataclasses.replace(CALIBRATED, **{m: False}) for m in MEASURES},
    **{
        f"plain and {m}": dataclasses.replace(PLAIN, **{m: True})
        for m in MEASURES
        if not getattr(PLAIN, m)
    },
}


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        texts: solutions whose tokens are scored.
        greedy: problems that are solved at temperature 0.
        problems, samples: problems solved at temperature 1, and how often each.
    """

    texts: int
    greedy: int
    problems: int
    samples: int


@dataclass(frozen=True)
class Outcome:
    """What one variant of a model makes of the same problems, a row for each.

    Attributes:
        surprise: nats of each token of a solution, one array for each text.
        greedy: whether it is solved [greedy].
        sampled: share of samples that are right [problems].
    """

    surprise: list[np.ndarray]
    greedy: np.ndarray
    sampled: np.ndarray


def measure(folder: Path, task: Task, sizes: Sizes) -> Outcome:
    """Runs the engine over held-out problems; the same ones in every call."""
    from jaxserve import LLM

    problems = held_out(task, max(sizes.texts, sizes.greedy, sizes.problems))
    with LLM(folder, progress=False, enable_prefix_caching=False) as llm:
        return Outcome(
            surprise(llm, task, problems[: sizes.texts]),
            solved(llm, task, problems[: sizes.greedy], temperature=0.0),
            solved(llm, task, problems[: sizes.problems], n=sizes.samples, seed=0),
        )


def held_out(task: Task, count: int) -> list[Problem]:
    """The first `count` problems of the test split, or all that it has."""
    found: dict[str, Problem] = {}
    repeated = 0  # in a row
    for problem in problems_of(task, "test", 0):
        repeated = repeated + 1 if problem.key in found else 0
        found.setdefault(problem.key, problem)
        if len(found) == count or repeated > 200 + 10 * len(found):
            break
    return list(found.values())


def surprise(llm: Any, task: Task, problems: Sequence[Problem]) -> list[np.ndarray]:
    """Nats of the tokens of each problem's own solution."""
    from jaxserve import SamplingParams

    end = min(llm.tokenizer.eos_token_ids)
    prompts = llm.tokenizer.encode_batch([p.prompt for p in problems])
    whole = [f"{p.prompt} {task.solve(p, Random(p.key))}" for p in problems]
    texts = [[*ids, end] for ids in llm.tokenizer.encode_batch(whole)]
    params = SamplingParams(max_tokens=1, prompt_logprobs=0)
    outs = llm.generate([{"prompt_token_ids": t} for t in texts], params)
    found = []
    for prompt, text, out in zip(prompts, texts, outs, strict=True):
        rows = range(len(prompt), len(text))
        found.append(np.array([-out.prompt_logprobs[i][text[i]].logprob for i in rows]))
    return found


def solved(llm: Any, task: Task, problems: Sequence[Problem], **sampling: Any) -> np.ndarray:
    """Share of each problem's solutions that are right."""
    from jaxserve import SamplingParams

    if not problems or not sampling.get("n", 1):
        return np.empty(0)
    params = SamplingParams(max_tokens=llm.max_model_len // 2, **sampling)
    outs = llm.generate([p.prompt for p in problems], params)
    return np.array(
        [
            np.mean([task.grade(problem, o.text).correct for o in out.outputs])
            for problem, out in zip(problems, outs, strict=True)
        ]
    )


def perplexity(rows: np.ndarray) -> float:
    """Of nats and tokens of texts [n, 2]."""
    nats, tokens = rows.sum(0)
    return float(np.exp(nats / tokens))


def drift(base: Outcome, other: Outcome) -> tuple[float, float, float]:
    """Root mean square change of a token's log-probability in millinats, and its interval."""
    pairs = zip(base.surprise, other.surprise, strict=True)
    rows = np.array([(np.square(a - b).sum(), len(a)) for a, b in pairs])

    def statistic(some: list[np.ndarray]) -> float:
        squares, tokens = np.sum(some, 0)
        return 1000 * float(np.sqrt(squares / tokens))

    return interval(list(rows), statistic, rounds=300)


def compare(
    base: np.ndarray,
    other: np.ndarray,
    statistic: Callable[[np.ndarray], float],
    rounds: int = 2000,
) -> tuple[float, float, float]:
    """Relative difference in percent and its interval; both see the same problems in each draw."""
    rng = np.random.default_rng(0)

    def difference(at: Any) -> float:
        return 100 * (statistic(other[at]) / statistic(base[at]) - 1)

    draws = [difference(rng.integers(0, len(base), len(base))) for _ in range(rounds)]
    low, high = np.quantile(draws, [0.025, 0.975])
    return difference(slice(None)), float(low), float(high)


def figures(base: Outcome, other: Outcome) -> Iterator[tuple[str, float, tuple[float, ...]]]:
    """Name, value, and difference from `base` with its interval."""
    if base.surprise:
        a, b = (np.array([(x.sum(), len(x)) for x in o.surprise]) for o in (base, other))
        yield "perplexity", perplexity(b), compare(a, b, perplexity)
        yield "drift", drift(base, other)[0], drift(base, other)
    for name in ("greedy", "sampled"):
        a, b = getattr(base, name), getattr(other, name)
        if len(a):
            yield f"{name} pass@1", float(b.mean()), compare(a, b, lambda x: float(x.mean()))


def run(
    folder: Path, variants: Mapping[str, QuantizeConfig], sizes: Sizes
) -> Iterator[tuple[str, str, float, tuple[float, ...]]]:
    """Variant, figure, its value, and its difference from float32 with its interval."""
    task = task_of(folder)
    documents = own_text(folder)
    base = measure(folder, task, sizes)
    for name, value, difference in figures(base, base):
        yield "float32", name, value, difference
    for variant, config in variants.items():
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as place:
            out = Path(place) / "model"
            quantize_checkpoint(folder, out, config, documents=documents, progress=False)
            made = time.monotonic() - started
            found = measure(out, task, sizes)
        print(f"{variant}: {made:.0f} + {time.monotonic() - started - made:.0f} s", flush=True)
        for name, value, difference in figures(base, found):
            yield variant, name, value, difference


def table(rows: Sequence[tuple[str, str, float, tuple[float, ...]]]) -> str:
    """Variants down, figures across, in Markdown: difference (interval)."""
    names = list(dict.fromkeys(name for _, name, _, _ in rows))
    found = {(variant, name): (value, d) for variant, name, value, d in rows}
    lines = [f"| | {' | '.join(names)} |", "|---" * (1 + len(names)) + "|"]
    for variant in dict.fromkeys(variant for variant, *_ in rows):
        cells = []
        for name in names:
            value, d = found[variant, name]
            sign = "" if name == "drift" else "+"
            spread = f"{d[0]:{sign}.2f} ({d[1]:{sign}.2f} to {d[2]:{sign}.2f})"
            cells.append(f"{value:.4f}" if variant == "float32" else spread)
        lines.append(f"| {variant} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--texts", type=int, default=2000)
    parser.add_argument("--greedy", type=int, default=2000)
    parser.add_argument("--problems", type=int, default=0)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--out", type=Path, help="append the records to this file")
    args = parser.parse_args()
    sizes = Sizes(args.texts, args.greedy, args.problems, args.samples)
    for folder in args.models:
        rows = []
        for row in run(folder, {v: VARIANTS[v] for v in args.variants}, sizes):
            rows.append(row)
            variant, name, value, difference = row
            line = record(
                folder.name, f"{variant}: {name}", [value], "", sizes=dataclasses.asdict(sizes),
                difference=[round(x, 3) for x in difference],
            )  # fmt: skip
            write(line, args.out)
        print(f"\n{folder.name}\n\n{table(rows)}", flush=True)


if __name__ == "__main__":
    main()
