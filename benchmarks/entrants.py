"""Who enters the race of a case, compiled, and held against the reference before the clock runs."""

from __future__ import annotations

import dataclasses
import os
import random
import sys
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax

from benchmarks.ahead import Ahead, Make
from benchmarks.alternatives import Alternative, alternatives
from benchmarks.order import bodies_on
from benchmarks.programs import (
    Program,
    TorchProgram,
    agreement,
    compiled_over,
    compiled_truth,
    input_sets,
    maker,
    runner,
    shapes_of,
    truth,
)
from benchmarks.stopwatch import Launch, race
from benchmarks.torch_arrays import torch_sees
from kernels_pallas.op import Body, Case, Op

XLA = "reference"
"""The op's plain form, which XLA compiles, as the chooser and its tables call it."""

_LIBRARY_TOLERANCE = 0.02  # of bfloat16 results that were rounded once more than ours
_PREPARING = threading.Lock()  # ways lay inputs out alike: the second finds the first's programs
_FINALISTS = 2  # tiles of a body that enter the race beside its own choice


@dataclass(frozen=True)
class Entrant:
    """One way to compute a case.

    Attributes:
        kind: "body", "xla" (the op's reference) or "library".
        build: compiles it.
        expected: what `view` of its first result must be.
        implementation, tile: as the tuned tables say; "" and None for libraries.
    """

    name: str
    kind: str
    build: Callable[[], Program | TorchProgram]
    expected: Any
    tolerance: float
    view: Callable[[tuple[Any, Any]], Any] = lambda found: found
    implementation: str = ""
    tile: Any = None
    note: str = ""

    def about(self) -> dict[str, Any]:
        """What a record begins with."""
        line: dict[str, Any] = {"contestant": self.name, "kind": self.kind}
        if self.tile is not None:
            line["tile"] = dataclasses.asdict(self.tile)
        return line | ({"note": self.note} if self.note else {})


@dataclass(frozen=True)
class Checked:
    """An entrant that has been compiled and compared.

    Attributes:
        launch: None if it may not race.
        error: relative to the largest expected value.
        problem: why it may not: {"failed": ...} or {"wrong": ...}.
    """

    entrant: Entrant
    launch: Launch | None
    error: float
    problem: dict[str, str]


@dataclass(frozen=True)
class Field:
    """A case, its inputs and the truth about them: what entrants are made of.

    Attributes:
        sets: of inputs, or of their shapes.
        device: as tuned tables call it.
        ahead: where programs may be that were compiled before.
        without: bodies that may not run.
    """

    op: Op
    case: Case
    sets: Sequence[Any]
    platform: str
    device: str = ""
    ahead: Ahead = field(default_factory=Ahead)
    without: frozenset[str] = frozenset()

    @classmethod
    def of_shapes(cls, op: Op, case: Case, count: int, *more: Any, **options: Any) -> Field:
        """A field that compiles, and cannot run until it is `filled`."""
        return cls(op, case, [shapes_of(case)] * count, *more, **options)

    def filled(self) -> Field:
        """With inputs in place of shapes."""
        make = self.ahead.take(self._key("make"), lambda: maker(self.case))
        return dataclasses.replace(self, sets=input_sets(self.case, len(self.sets), make))

    @property
    def joined(self) -> bool:
        return self.platform != "cpu"

    def programs(self, *, xla: bool = True, tiles: int = 0) -> dict[Hashable, Make]:
        """What it will ask to be compiled, with XLA's form or without it, and with so many tiles;
        but for libraries, which look at values of inputs."""
        found: dict[Hashable, Make] = {
            self._key("make"): lambda: maker(self.case),
            self._key("truth"): self._compiled_truth,
        }
        wanted: list[tuple[str, Any]] = [(XLA, None)] if xla else []
        for name, body in self._here().items():
            own = [body.wanted(self.device)]
            tried = candidates(body, self.device, tiles) if tiles else []
            wanted += [(name, tile) for tile in (*own, *tried)]
        for name, tile in wanted:
            found[self._key(name, tile)] = partial(self._compiled, name, tile)
        return found

    def _key(self, *what: Any) -> Hashable:
        return self.op.name, self.case.name, *what

    def _compiled_truth(self) -> Any:
        return compiled_truth(self.op, self.case, self.sets, self.joined)

    def _compiled(self, name: str, tile: Any) -> Any:
        run = runner(self.op, self.case, name, tile)
        return compiled_over(run, self.sets, self.joined, self.op.in_place)

    def expected(self) -> tuple[Any, Any]:
        compiled = self.ahead.take(self._key("truth"), self._compiled_truth)
        return truth(self.op, self.case, self.sets, self.joined, compiled).first()

    def implementation(self, expected: Any, name: str, tile: Any = None) -> Entrant:
        def build() -> Program:
            make = partial(self._compiled, name, tile)
            compiled = self.ahead.take(self._key(name, tile), make)
            run = runner(self.op, self.case, name, tile)
            return Program(run, self.sets, self.joined, self.op.in_place, compiled)

        title = "xla" if name == XLA else name
        return Entrant(
            f"{title} {_words(tile)}" if tile else title, "xla" if name == XLA else "body",
            build, expected, self.case.tolerance, implementation=name, tile=tile,
        )  # fmt: skip

    def bodies(self, expected: Any) -> Iterator[Entrant]:
        """The op's XLA form, and its bodies for the platform, each as it chooses for itself."""
        yield self.implementation(expected, XLA)
        for name, body in self._here().items():
            own = self.implementation(expected, name, body.wanted(self.device))
            yield dataclasses.replace(own, name=name, tile=None)

    def tuned(self, expected: Any, most: int, seed: int = 0) -> Iterator[Entrant]:
        """The quickest tiles of each body, of `most` that are tried."""
        for name, body in self._here().items():
            tiles = candidates(body, self.device, most, seed)
            tried = [self.implementation(expected, name, tile) for tile in tiles]
            right = {c.entrant.name: c for c in check(tried) if c.launch}
            launches = {key: c.launch for key, c in right.items() if c.launch}
            times = race(launches, 0.01, least=2, batch=0.005)
            for key in sorted(times, key=lambda key: times[key].median)[:_FINALISTS]:
                yield right[key].entrant

    def _here(self) -> dict[str, Body]:
        names = bodies_on(self.op, self.case, self.platform)
        return {name: self.op.bodies[name] for name in names if name not in self.without}

    def libraries(self, expected: Any, most_work: float, *, torch: bool) -> Iterator[Entrant]:
        """What else there is, but for what does more than `most_work` times the operations."""
        for way in alternatives(self.op, self.case, self.sets[0], self.platform):
            wanted = not way.uses_torch or (torch and torch_sees(self.platform))
            if wanted and way.work <= most_work:
                yield self._library(expected, way)

    def _library(self, expected: Any, way: Alternative) -> Entrant:
        def build() -> Program | TorchProgram:
            if way.uses_torch:
                with _PREPARING:
                    return TorchProgram(way, self.sets, self.platform)
            with jax.numpy_dtype_promotion("standard"):  # which libraries rely on
                with _PREPARING:
                    sets = [way.prepare(x) for x in self.sets]
                return Program(way.run, sets, self.joined)

        first, whole = self.sets[0], expected[1]
        if way.asked:
            asked = way.asked(first)
            whole = truth(self.op, self.case, [asked], self.joined).first()[1]
        return Entrant(
            way.name, "library", build, way.part(whole),
            max(self.case.tolerance, _LIBRARY_TOLERANCE),
            view=lambda found: way.finish(found[1], first), note=way.note,
        )  # fmt: skip


def candidates(body: Body, device: str, most: int, seed: int = 0) -> list[Any]:
    """Tiles to try on a device, `most` of them, drawn from all."""
    tiles = list(body.tiles(device))
    return random.Random(seed).sample(tiles, most) if len(tiles) > most else tiles


def check(entrants: Sequence[Entrant]) -> list[Checked]:
    """Compiles all at once, since compilers let go of the interpreter, and compares one by one."""

    def compiled(entrant: Entrant) -> Program | TorchProgram | Exception:
        try:
            return entrant.build()
        except Exception as error:  # a refusal, a compiler's, or no memory: the record says which
            return error

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        programs = list(pool.map(compiled, entrants))
    return [
        _compared(entrant, program) for entrant, program in zip(entrants, programs, strict=True)
    ]


def _compared(entrant: Entrant, program: Program | TorchProgram | Exception) -> Checked:
    if not isinstance(program, Exception):
        print(f"... {entrant.name}", file=sys.stderr, flush=True)  # should it be the last to run
        try:
            found = agreement(entrant.view(program.first()), entrant.expected, entrant.tolerance)
            if found.right:
                return Checked(entrant, program.launch(), found.error, {})
            return Checked(entrant, None, found.error, {"wrong": found.reason})
        except Exception as error:
            program = error
    return Checked(entrant, None, 0.0, {"failed": short(program)})


def short(error: Exception) -> str:
    """An error in a line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _words(tile: Any) -> str:
    return ",".join(f"{k}={v}" for k, v in dataclasses.asdict(tile).items())
