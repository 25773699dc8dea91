"""Several processes as one program: how they start, and how they agree on what has come in.

Every process runs the same steps on its part of the mesh. Requests reach process 0 alone, so before
a step it tells the others, and all go on from the same events in the same order::

    multihost.start("10.0.0.1:8476", num_processes=2, process_id=0)
    events = Agreement("engine")
    for step in ...:
        incoming = events.agree(drain(queue) if jax.process_index() == 0 else None)

Messages go through the coordinator's key-value store, not through devices: between two processes of
one host a message arrives after 0.2 ms, where `multihost_utils.broadcast_one_to_all` takes 7 ms.
"""

from __future__ import annotations

import atexit
import json
import os
import time
from typing import Any

import jax

_ADDRESS, _COUNT, _ID = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
_WINDOW = 64  # messages that a process may be behind


class PeerLostError(RuntimeError):
    """Another process has not answered in time; what it was to do is not done."""


def start(
    address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    heartbeat_seconds: int = 10,
) -> None:
    """Joins the processes of a program; call it before anything asks for a device.

    Args:
        address: host and port where process 0 listens. What is not given is taken from
            JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID. Where those are not set
            either, JAX asks the cluster (Slurm, Kubernetes, Cloud TPU).
        heartbeat_seconds: after which a silent process counts as lost. The others go on, and
            `Agreement` tells process 0; without JAX's recoverability they would be aborted. If
            process 0 dies, JAX aborts the others at once, and says so in their logs.

    Raises:
        ValueError: part of it is given and part is missing, or contradicts itself.
    """
    address = address or os.environ.get(_ADDRESS)
    num_processes = _number(num_processes, _COUNT)
    process_id = _number(process_id, _ID)
    given = {_ADDRESS: address, _COUNT: num_processes, _ID: process_id}
    missing = [name for name, value in given.items() if value is None]
    if missing and len(missing) < len(given):
        raise ValueError(f"{', '.join(missing)} missing, beside {_set(given)}: give all or none")
    if process_id is not None and num_processes is not None:
        if not 0 <= process_id < num_processes:
            raise ValueError(f"{process_id=}, expected 0 to {num_processes - 1}")
        if num_processes == 1:
            return
    jax.config.update("jax_enable_recoverability", True)
    jax.distributed.initialize(
        address, num_processes, process_id, heartbeat_timeout_seconds=heartbeat_seconds
    )
    atexit.register(stop)


def stop(timeout: float = 10.0) -> None:
    """Leaves the program; runs at exit too. Process 0, which has the coordinator, is the last.

    Args:
        timeout: seconds that process 0 waits for the others, which are aborted when it goes.
    """
    if not jax.distributed.is_initialized():
        return
    if jax.process_index() == 0:
        everyone = list(range(jax.process_count()))
        deadline = time.monotonic() + timeout
        while len(_client().get_live_nodes(everyone)) > 1 and time.monotonic() < deadline:
            time.sleep(0.01)
    jax.distributed.shutdown()


def _number(value: int | None, name: str) -> int | None:
    text = os.environ.get(name)
    if value is not None or text is None:
        return value
    if not text.isdecimal():
        raise ValueError(f"{name}={text!r}: expected a whole number")
    return int(text)


def _set(given: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in given.items() if value is not None)


def num_processes() -> int:
    """Processes that `start` has joined, this one included; asks for no device."""
    from jax._src import distributed

    return distributed.global_state.num_processes or 1


def process_id() -> int:
    """The number of this one; asks for no device."""
    from jax._src import distributed

    return distributed.global_state.process_id


def lost(patience: float = 0.0) -> list[int]:
    """Processes that do not answer any more, for which it waits so many seconds."""
    everyone, deadline = list(range(num_processes())), time.monotonic() + patience
    while True:
        alive = _client().get_live_nodes(everyone)
        gone = [p for p in everyone if p not in alive]
        if gone or time.monotonic() > deadline:
            return gone
        time.sleep(0.1)


class Agreement:
    """Messages of process 0 that reach every process, in order.

    A process may be a few messages behind; process 0 waits for one that is further behind than
    that, and forgets what all have read. With one process nothing is sent.

    Attributes:
        name: tells agreements of one program apart.
        timeout: seconds that any process waits for another.
    """

    def __init__(self, name: str, *, timeout: float = 60.0) -> None:
        self.name = name
        self.timeout = timeout
        self._count = 0  # messages so far, the same everywhere
        self._forgotten = 0

    def agree(self, message: Any = None) -> Any:
        """Process 0's message, in every process; all call this equally often.

        Args:
            message: anything JSON can say; process 0's counts. Tuples come back as lists, there
                too, so that all processes see the same.

        Raises:
            PeerLostError: another process has not sent, or not read, within the timeout.
        """
        leads = jax.process_index() == 0
        data = json.dumps(message).encode() if leads else b""
        if jax.process_count() > 1:
            if leads:
                self._send(data)
            else:
                data = self._receive()
        self._count += 1
        return json.loads(data)

    def meet(self, timeout: float = 600.0) -> None:
        """Returns when all processes have called this.

        Raises:
            PeerLostError: one of them has not within so many seconds.
        """
        try:
            _client().wait_at_barrier(f"{self.name}/met/{self._count}", int(timeout * 1000))
        except jax.errors.JaxRuntimeError as error:
            raise PeerLostError(
                f"process {jax.process_index()}: not all processes came to {self.name!r} within "
                f"{timeout} s ({str(error).splitlines()[0]})"
            ) from error

    def _send(self, data: bytes) -> None:
        if self._count - self._forgotten >= 2 * _WINDOW:
            self._forget(self._forgotten + _WINDOW)
        _client().key_value_set_bytes(self._key(), data)

    def _key(self) -> str:
        """Of the next message; those of a window lie together, to be deleted at once."""
        return f"{self.name}/said/{self._count // _WINDOW}/{self._count}"

    def _receive(self) -> bytes:
        try:
            data = _client().blocking_key_value_get_bytes(self._key(), int(self.timeout * 1000))
        except jax.errors.JaxRuntimeError as error:
            raise PeerLostError(
                f"process {jax.process_index()}: no message {self._count} of {self.name!r} from "
                f"process 0 within {self.timeout} s; it is gone, or took a step longer than that "
                f"({str(error).splitlines()[0]})"
            ) from error
        if (self._count + 1) % (_WINDOW // 2) == 0:
            mine = f"{self.name}/read/{jax.process_index()}"
            _client().key_value_set(mine, str(self._count + 1), allow_overwrite=True)
        return data

    def _forget(self, until: int) -> None:
        """Deletes the oldest window of messages, once all have read the first `until`."""
        deadline = time.monotonic() + self.timeout
        while late := {p: n for p, n in self._read().items() if n < until}:
            if time.monotonic() > deadline:
                seen = ", ".join(f"process {p} read {n}" for p, n in late.items())
                raise PeerLostError(
                    f"{seen} of the first {until} messages of {self.name!r}, and no more within "
                    f"{self.timeout} s: gone, or that far behind"
                )
            time.sleep(0.001)
        _client().key_value_delete(f"{self.name}/said/{self._forgotten // _WINDOW}/")
        self._forgotten = until

    def _read(self) -> dict[int, int]:
        """How many messages each other process has read, as it last said."""
        said = dict(_client().key_value_dir_get(f"{self.name}/read/"))
        numbers = {int(key.rpartition("/")[2]): int(value) for key, value in said.items()}
        return {p: numbers.get(p, 0) for p in range(1, jax.process_count())}


def _client() -> Any:
    """The key-value store's client; JAX 0.10 to 0.12 have no public name for it."""
    from jax._src import distributed

    if distributed.global_state.client is None:
        raise RuntimeError("the processes have not been joined: call sharding.multihost.start")
    return distributed.global_state.client
