"""Accuracy against tokens: curves, and differences between methods with honest intervals.

Runs are paired: path i of a question is the same whoever uses it, so methods are compared question
by question. A bootstrap draws questions, and then seeds of each, the same for all methods: seeds
make a question's own figure surer, and are not taken for more questions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

ROUNDS = 10_000
CHUNK = 250  # resamples at a time


@dataclass(frozen=True, eq=False)
class Runs:
    """One method at several budgets: whether answers were right, and what they cost [B, Q, S].

    B budgets, ascending; Q questions; S seeds.
    """

    right: np.ndarray
    tokens: np.ndarray

    def __post_init__(self):
        if self.right.ndim != 3 or self.right.shape != self.tokens.shape:
            raise ValueError(
                f"right {self.right.shape} and tokens {self.tokens.shape} are [B, Q, S]"
            )


@dataclass(frozen=True)
class Difference:
    """A difference, its 95 % interval, and the two-sided bootstrap p-value that it is none."""

    value: float
    low: float
    high: float
    p: float


def curve(runs: Runs) -> tuple[np.ndarray, np.ndarray]:
    """Mean tokens and mean accuracy at each budget [B]."""
    return runs.tokens.mean((1, 2)), runs.right.mean((1, 2))


def accuracy_at(curves: np.ndarray, tokens: float) -> np.ndarray:
    """Accuracy once so many tokens are spent, on each of many curves [R, 2, B]: tokens, accuracy.

    Linear in log tokens between budgets. Beyond the last a method keeps what it has; before the
    first nothing is known of it.
    """
    order = np.argsort(curves[:, 0], axis=1, kind="stable")
    x, y = (np.take_along_axis(part, order, 1) for part in (np.log(curves[:, 0]), curves[:, 1]))
    behind = np.sum(x <= np.log(tokens) + 1e-9, axis=1)  # budgets that cost no more
    low = np.clip(behind - 1, 0, None)
    high = np.clip(behind, None, x.shape[1] - 1)
    found = _between(y, x, low, high, np.log(tokens))
    return np.where(behind > 0, found, np.nan)


def tokens_at(curves: np.ndarray, accuracy: np.ndarray) -> np.ndarray:
    """Tokens at which each curve first gets to an accuracy [R]; infinite if it never does.

    A curve that is above it from the start is given its first budget: it may need less.
    """
    above = curves[:, 1] >= accuracy[:, None]
    high = np.argmax(above, axis=1)
    low = np.clip(high - 1, 0, None)
    found = np.exp(_between(np.log(curves[:, 0]), curves[:, 1], low, high, accuracy))
    return np.where(above.any(1), found, np.inf)


def _between(
    y: np.ndarray, x: np.ndarray, low: np.ndarray, high: np.ndarray, at: np.ndarray | float
) -> np.ndarray:
    """In each row the point at x = `at` of the line through columns `low` and `high` [R]."""
    rows = np.arange(len(x))
    x0, x1, y0, y1 = x[rows, low], x[rows, high], y[rows, low], y[rows, high]
    wide = x1 != x0
    share = np.where(wide, (at - x0) / np.where(wide, x1 - x0, 1.0), 1.0)
    return y0 + share * (y1 - y0)


def area(curves: np.ndarray, low: float, high: float) -> np.ndarray:
    """Mean accuracy over log tokens between two costs, of each curve [R]."""
    at = np.exp(np.linspace(np.log(low), np.log(high), 65))
    heights = np.stack([accuracy_at(curves, x) for x in at])
    return np.trapezoid(heights, axis=0) / (len(at) - 1)


def bootstrap(methods: Sequence[Runs], rounds: int = ROUNDS, seed: int = 0) -> np.ndarray:
    """Curves of every method on the same resamples [M, R, 2, B]; the first is of what was measured.

    Questions are drawn with replacement, and for each draw as many of its seeds as it has.
    """
    _, questions, seeds = methods[0].right.shape
    if any(m.right.shape[1:] != (questions, seeds) for m in methods):
        raise ValueError("methods are paired: all need the same questions and seeds")
    rng = np.random.default_rng(seed)
    all_runs = np.stack([np.stack([m.tokens, m.right]) for m in methods])  # [M, 2, B, Q, S]
    flat = all_runs.reshape(*all_runs.shape[:3], -1).astype(np.float64)
    means = [flat.mean(-1)[:, None]]
    for r in range(0, rounds, CHUNK):
        weights = _weights(rng, min(CHUNK, rounds - r), questions, seeds)
        means.append(np.einsum("mkbn,rn->mrkb", flat, weights, optimize=True))
    return np.concatenate(means, 1)


def _weights(rng: np.random.Generator, rounds: int, questions: int, seeds: int) -> np.ndarray:
    """How much each run counts in each resample [R, Q * S]."""
    q = rng.integers(0, questions, (rounds, questions, 1))
    runs = q * seeds + rng.integers(0, seeds, (rounds, questions, seeds))
    size = questions * seeds
    places = runs.reshape(rounds, size) + size * np.arange(rounds)[:, None]
    return np.bincount(places.ravel(), minlength=rounds * size).reshape(rounds, size) / size


def difference(samples: np.ndarray) -> Difference:
    """Of bootstrapped values [R] whose first is the measured one."""
    drawn = samples[1:]
    low, high = np.quantile(drawn, [0.025, 0.975], method="nearest")
    sides = min(np.mean(drawn <= 0), np.mean(drawn >= 0))
    p = min(
        2 * max(float(sides), 1 / len(drawn)), 1.0
    )  # no bootstrap says less than one draw in all
    return Difference(float(samples[0]), float(low), float(high), p)


def more_accurate(ours: np.ndarray, theirs: np.ndarray, tokens: float) -> Difference:
    """Accuracy that one method has over another at matched tokens."""
    return difference(accuracy_at(ours, tokens) - accuracy_at(theirs, tokens))


def fewer_tokens(ours: np.ndarray, theirs: np.ndarray, budget: int) -> Difference:
    """Share of tokens saved at the accuracy that another method has at its budget `budget`."""
    spent, reached = theirs[:, 0, budget], theirs[:, 1, budget]
    return difference(1 - tokens_at(ours, reached) / spent)


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """Adjusted p-values of a family of comparisons (Holm, 1979)."""
    adjusted, most = dict[str, float](), 0.0
    for i, (name, value) in enumerate(sorted(p.items(), key=lambda item: item[1])):
        most = max(most, min(value * (len(p) - i), 1.0))
        adjusted[name] = most
    return {name: adjusted[name] for name in p}


def compare(
    methods: Mapping[str, Runs], ours: str, tokens: Sequence[float], rounds: int = ROUNDS
) -> dict[str, dict[str, Difference]]:
    """One method against each other one: at every cost, and in the area under the curve."""
    names = list(methods)
    curves = dict(zip(names, bootstrap(list(methods.values()), rounds), strict=True))
    tests: dict[str, Callable[[str], Difference]] = {
        f"accuracy at {t:g} tokens": lambda other, t=t: more_accurate(
            curves[ours], curves[other], t
        )
        for t in tokens
    }
    low, high = min(tokens), max(tokens)
    tests["area"] = lambda other: difference(
        area(curves[ours], low, high) - area(curves[other], low, high)
    )
    return {
        other: {what: test(other) for what, test in tests.items()}
        for other in names
        if other != ours
    }
