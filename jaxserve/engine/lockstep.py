"""Engines of several processes that do the same between the same steps.

A program over devices of several processes runs when all of them launch it, with shapes that agree.
Process 0 takes requests. Before each step it tells the others what has come in, each engine applies
that, and all of them step: what an engine decides follows from what it was told and from the tokens
it has drawn, which every process reads.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from jaxserve.config import EngineConfig
from jaxserve.engine.engine import Engine, EngineStats
from jaxserve.engine.sequence import Sequence
from jaxserve.errors import ConfigError, EngineError
from jaxserve.request import SamplingParams, StructuredOutputs
from sharding import multihost
from sharding.multihost import Agreement, PeerLostError

log = logging.getLogger(__name__)

Event = list[Any]
"""A method of `Engine` and its arguments, as JSON can say them; "add" has `as_event`'s request."""

_END = "end"
_PATIENCE = 20.0  # seconds in which JAX notices that a process is gone: twice its heartbeat
_LOOK, _GRACE = 2.0, 5.0
_numbers = itertools.count()  # engines of a program, the same everywhere


class Lockstep:
    """One process's part in that; a collective object, made by all processes alike."""

    def __init__(self) -> None:
        self._agreement = Agreement(f"engine-{next(_numbers)}")
        self.index, self.count = jax.process_index(), jax.process_count()
        self._reason: EngineError | None = None

    @classmethod
    def over(cls, mesh: Mesh | None) -> Lockstep | None:
        """Of the processes whose devices a mesh has; None: there is one.

        Raises:
            ConfigError: some devices of the processes would have no part.
        """
        if multihost.num_processes() == 1:
            return None
        count = 1 if mesh is None else mesh.devices.size
        if count != (there := jax.device_count()):
            raise ConfigError(
                f"the split takes {count} devices, and {multihost.num_processes()} processes have "
                f"{there}: ask for a split over all of them"
            )
        return cls()

    @property
    def leads(self) -> bool:
        return self.index == 0

    def check(self, model_type: str, config: EngineConfig) -> None:
        """Checks that all processes were asked for the same.

        Raises:
            ConfigError: they were not; the message names the setting.
        """
        asked = {"model_type": model_type} | dataclasses.asdict(config)
        mine = {name: str(value) for name, value in asked.items() if name != "progress"}
        theirs = self._agreement.agree(mine)
        for name, value in mine.items():
            if value != theirs[name]:
                raise ConfigError(
                    f"{name}={value} in process {self.index}, and {theirs[name]} in process 0: "
                    "start all processes with the same settings"
                )

    def agreed(self, number: int) -> int:
        """Process 0's number, where each would come to its own."""
        return self._agreement.agree(number)

    def meet(self) -> None:
        """Returns when all processes are here."""
        self._agreement.meet()

    def tell(self, events: list[Event]) -> None:
        """Process 0's events of the next step, to all others."""
        self._agreement.agree(events)

    def end(self) -> None:
        """Tells all others that this was all."""
        try:
            self.tell([[_END]])
        except PeerLostError as error:
            log.warning("not everybody heard that the engine was shut down: %s", error)

    def told(self) -> list[Event]:
        """What process 0 tells next; JAX ends this process if process 0 dies before that."""
        while True:
            try:
                return self._agreement.agree()
            except PeerLostError as error:
                log.debug("process 0 is idle: %s", error)

    def explained(self, error: BaseException) -> EngineError:
        """The error of a step, with the names of processes that are gone, if any are."""
        if self._reason is None:
            lost = _named(multihost.lost(_PATIENCE))
            why = f"{lost} gone, so the step failed" if lost else "the step failed"
            self._reason = EngineError(f"{why}: {error}; start all processes again")
        return self._reason

    def watch(self, stop: threading.Event) -> EngineError | None:
        """Waits for `stop`, or for a process to be gone; then the error, a while later.

        The engine's thread is in a step that other process has a part in. Mostly that fails, and
        the while is for it to say so; but a process that is cut off leaves it waiting.
        """
        while not stop.wait(_LOOK):
            if lost := _named(multihost.lost()):
                if stop.wait(_GRACE):
                    return None
                return EngineError(f"{lost} gone: no answer; start all processes again")
        return None


def _named(lost: list[int]) -> str:
    names = " and ".join(f"process {p}" for p in lost)
    return names and f"{names} of the mesh {'is' if len(lost) == 1 else 'are'}"


def as_event(sequences: list[Sequence]) -> Event:
    """A request as others can be told of it."""
    head = sequences[0]
    return [
        "add",
        {
            "ids": head.tokens,
            "params": dataclasses.asdict(head.params),
            "request_id": head.generation.request_id,
            "seeds": [seq.seed for seq in sequences],
        },
    ]


def sequences_of(
    request: Mapping[str, Any], prepare: Callable[..., list[Sequence]]
) -> list[Sequence]:
    """The sequences of a request that process 0 has told of; `prepare` is `Intake.sequences`."""
    fields = dict(request["params"])
    if fields["structured_outputs"] is not None:
        fields["structured_outputs"] = StructuredOutputs(**fields["structured_outputs"])
    params = SamplingParams(**fields)
    sequences = prepare(list(request["ids"]), params, request_id=request["request_id"])
    for seq, seed in zip(sequences, request["seeds"], strict=True):
        seq.seed = tuple(seed)
    return sequences


class Follower:
    """What `EngineLoop` is in the processes that take no requests: it does what process 0 does."""

    def __init__(self, engine: Engine, lockstep: Lockstep):
        self._engine, self._lockstep = engine, lockstep
        self._closed = threading.Event()

    def follow(self, prepare: Callable[..., list[Sequence]]) -> None:
        """Steps with process 0 until that shuts its engine down.

        Raises:
            EngineError: a step failed; the processes are no longer at the same place.
        """
        engine = self._engine
        engine.explain = self._lockstep.explained
        while True:
            for name, *arguments in self._lockstep.told():
                if name == _END:
                    return
                if name == "add":
                    engine.add(sequences_of(arguments[0], prepare))
                else:
                    getattr(engine, name)(*arguments)
            if engine.has_work:
                engine.step()

    def submit(self, sequences: list[Sequence]) -> None:
        raise self._refusal()

    def order(self, name: str, *arguments: Any) -> Any:
        raise self._refusal()

    def _refusal(self) -> EngineError:
        return EngineError(
            f"process {self._lockstep.index} follows process 0, which takes the requests: call "
            "follow() here"
        )

    def abort(self, request_id: str) -> None:
        """Only process 0 does; the request of a step that failed is nobody's."""

    def call(self, function: Callable[[Engine], Any]) -> Any:
        """The function's result; nobody else uses the engine before `follow`, or after."""
        return function(self._engine)

    def stats(self) -> EngineStats:
        return self._engine.stats()

    def close(self) -> None:
        """Frees the devices. Safe to call twice."""
        if not self._closed.is_set():
            self._closed.set()
            self._engine.close(EngineError("the engine has been shut down"))
            self._engine.runner.close()
