"""Recall: small tasks whose answers lie far back in the prompt, for experiments with the KV cache.

Each kind reads another part of its context, so that what a cache policy throws away shows:

    pairs   k3 v9 k1 v4 ... ? k1 v4                            one pair of many
    lookup  doc 2 k3 v9 k1 v4 doc 5 k1 v7 ... ? 5 k1 v7        which document matters too
    copy    v3 k9 v1 ... : v3 k9 v1 ...                        everything, in order
    lemma   x = 3 ; y = x + 4 ? y : x = 3 ; y = 3 + 4 = 7      values that are used and then dead
    text    the cat likes a bird . ... ? the cat likes a bird  the same, in words

A question asks for one thing, and its answer begins behind it at once. Small models then learn all
of this in minutes, given copying beside it, which teaches their heads to look for "the same again".
With several questions in a row the same heads say the next question: that was not learnt in half
an hour, nor were answers without any copying of keys.

As in "Mechanistic design and scaling of hybrid architectures" (Poli et al., 2024), these are the
elementary skills of a language model, each in its purest form.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from reasoning.tasks.task import STEP, Grade, Problem

KEYS = tuple(f"k{i}" for i in range(64))
VALUES = tuple(f"v{i}" for i in range(64))
NAMES = tuple("abcdefghijklmnopqrstuvwxyz")
NUMBERS = tuple(map(str, range(100)))
SUBJECTS = ("the cat", "a bird", "my friend", "the old man", "her sister", "no one")
VERBS = ("sees", "likes", "follows", "remembers", "paints", "forgets")
PLACES = ("in the garden", "by the sea", "at night", "under the bridge", "on the hill")
SENTENCES = ("doc", "?", ":", "=", "+", ";", ".", STEP)

_KINDS = ("pairs", "lookup", "copy", "lemma", "text")


@dataclass(frozen=True)
class Recall:
    """A mixture of the kinds, or one of them.

    Attributes:
        size: facts in a prompt at most.
        least: facts in a prompt at least; how many there are is uniform in its logarithm.
        kinds: names of what is mixed.
    """

    size: int = 24
    least: int = 2
    kinds: tuple[str, ...] = _KINDS

    def __post_init__(self):
        if not 2 <= self.least <= self.size <= len(KEYS):
            raise ValueError(f"{self}: 2 <= least <= size <= {len(KEYS)}")
        if not self.kinds or set(self.kinds) - set(_KINDS):
            raise ValueError(f"{self}: kinds are among {_KINDS}")

    @property
    def name(self) -> str:
        return "recall"

    @property
    def words(self) -> tuple[str, ...]:
        phrases = " ".join((*SUBJECTS, *VERBS, *PLACES)).split()
        words = (*KEYS, *VALUES, *NAMES, *NUMBERS, *SENTENCES, *phrases)
        return tuple(dict.fromkeys(words))

    def problem(self, rng: Random) -> Problem:
        kind = rng.choice(self.kinds)
        make: Callable[[Random, int], tuple[str, str]] = getattr(self, f"_{kind}")
        size = self.least * (self.size / self.least) ** rng.random()
        prompt, answer = make(rng, round(size))
        return Problem(prompt, prompt, (kind, answer))

    def solve(self, problem: Problem, rng: Random) -> str:
        return f"{self.answer(problem)} {STEP}"

    def answer(self, problem: Problem) -> str:
        return problem.facts[1]

    def grade(self, problem: Problem, solution: str) -> Grade:
        """The answer is all that stands before the end of the step."""
        said, closed, _ = f" {solution} ".partition(f" {STEP} ")
        answer = " ".join(said.split()) if closed else None
        right = answer == self.answer(problem)
        return Grade(answer, right, (right,) if closed else ())

    def _pairs(self, rng: Random, size: int) -> tuple[str, str]:
        keys, values = rng.sample(KEYS, size), rng.choices(VALUES, k=size)
        known = dict(zip(keys, values, strict=True))
        facts = " ".join(f"{k} {v}" for k, v in known.items())
        asked = rng.choice(keys)
        return f"{facts} ? {asked}", known[asked]

    def _lookup(self, rng: Random, size: int) -> tuple[str, str]:
        each = 4
        names = rng.sample(range(100), max(2, size // each))
        shared = rng.sample(KEYS, each)
        values = {(doc, key): rng.choice(VALUES) for doc in names for key in shared}
        docs = [
            " ".join(
                ["doc", str(doc), *(f"{k} {values[doc, k]}" for k in rng.sample(shared, each))]
            )
            for doc in names
        ]
        doc, asked = rng.choice(names), rng.choice(shared)
        return f"{' '.join(docs)} ? {doc} {asked}", values[doc, asked]

    def _copy(self, rng: Random, size: int) -> tuple[str, str]:
        words = " ".join(rng.choices(KEYS + VALUES, k=size))
        return f"{words} :", words

    def _lemma(self, rng: Random, size: int) -> tuple[str, str]:
        """Each new name adds a digit to one of the last two; the answer tells the way to it."""
        names, known = rng.sample(NAMES, min(max(2, size // 2), len(NAMES))), dict[str, int]()
        given, told = list[str](), list[str]()
        for i, name in enumerate(names):
            live = [other for other in names[max(0, i - 2) : i] if known[other] < 80]
            digit = rng.randrange(10)
            if live:
                other = rng.choice(live)
                known[name] = known[other] + digit
                given.append(f"{name} = {other} + {digit}")
                told.append(f"{name} = {known[other]} + {digit} = {known[name]}")
            else:
                known[name] = digit
                given.append(f"{name} = {digit}")
                told.append(given[-1])
        asked = rng.randrange(max(0, len(names) - 3), len(names))
        return f"{' ; '.join(given)} ? {names[asked]} :", " ; ".join(told[: asked + 1])

    def _text(self, rng: Random, size: int) -> tuple[str, str]:
        """A text in which everyone keeps to one verb and one place."""
        habits = {
            who: (rng.choice(VERBS), rng.choice(SUBJECTS), rng.choice(PLACES)) for who in SUBJECTS
        }
        told = [rng.choice(SUBJECTS) for _ in range(max(2, size // 4))]
        before = " ".join(f"{who} {' '.join(habits[who])} ." for who in told)
        who = rng.choice(told)
        return f"{before} ? {who}", " ".join(habits[who])
