"""Two processes of four CPU devices each, over loopback."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from sharding import multihost
from sharding.multihost import Agreement

ROOT = Path(__file__).parents[2]

START = """
import os, sys, time
import jax
jax.config.update("jax_num_cpu_devices", 4)
from sharding import multihost
multihost.start()
me, count = jax.process_index(), jax.device_count()  # which waits for all
"""
AGREE = """
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from sharding.mesh import Parallelism, layout, mesh
from sharding.probe import probe

topology = probe()
assert topology.name == "cpu:2x4" and topology.num_devices == count == 8, topology
there = mesh(Parallelism(data=2, tensor=4), topology)
owners = [[d.process_index for d in row] for row in there.devices[:, 0]]
assert owners == [[0] * 4, [1] * 4], owners  # a tensor group stays on its host

numbers = np.arange(8.0, dtype=np.float32)
placed = jax.make_array_from_callback(
    (8,), NamedSharding(there, P(("data", "expert", "tensor"))), lambda at: numbers[at])
total = jax.jit(jnp.sum, out_shardings=NamedSharding(there, P()))(placed)
assert float(total) == 28

events = multihost.Agreement("engine", timeout=20)
seen = []
for step in range(400):  # more than is kept
    if me and step == 100:
        time.sleep(0.2)  # falls behind, and process 0 waits
    seen.append(events.agree({"step": step, "ids": (step, "é")} if me == 0 else None))
assert seen == [{"step": step, "ids": [step, "é"]} for step in range(400)], seen[:3]
if me == 0:
    kept = multihost._client().key_value_dir_get("engine/said/")
    assert len(kept) <= 128, len(kept)
other = multihost.Agreement("other", timeout=20)
assert other.agree("beside" if me == 0 else None) == "beside"
start = time.perf_counter()
for _ in range(200):
    events.agree([])
print("ms", (time.perf_counter() - start) / 200 * 1e3)
print("agreed", flush=True)
if me:
    time.sleep(0.5)  # process 0 waits for it with the coordinator
"""
LOST = """
events = multihost.Agreement("engine", timeout=2)
silent = int(sys.argv[1])
assert events.agree("hello" if me == 0 else None) == "hello"
if me == silent:
    # The coordinator lives in process 0, and JAX aborts the others at once when it dies.
    time.sleep(5 if silent == 0 else 0)
    os._exit(0)
try:
    for _ in range(1000):
        events.agree("x")
except multihost.PeerLostError as error:
    print("lost:", error, flush=True)
    os._exit(0)
"""


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run(code: str, *arguments: str, codes: tuple[int, int] = (0, 0)) -> list[str]:
    """What two processes print, in order of their ids; they end with `codes`."""
    base = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    base |= {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", START + code, *arguments],
            env=base | {"JAX_PROCESS_ID": str(i)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    try:
        ended = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, expected, (_, errors) in zip(processes, codes, ended, strict=True):
        assert process.returncode == expected, errors
    return [out for out, _ in ended]


@pytest.mark.slow
def test_two_processes_agree():
    for out in run(AGREE):
        assert "agreed" in out
        print(out)


@pytest.mark.slow
@pytest.mark.parametrize(
    "silent, said",
    [
        (0, "process 1: no message 1 of 'engine' from process 0 within 2 s"),
        (1, "process 1 read 0 of the first 64 messages of 'engine'"),
    ],
)
def test_a_lost_process_is_told(silent: int, said: str):
    out = run(LOST, str(silent))
    assert f"lost: {said}" in out[1 - silent]


def test_one_process_agrees_with_itself():
    events = Agreement("alone")
    assert events.agree({"a": (1, 2)}) == {"a": [1, 2]}
    assert events.agree() is None


def test_starting_alone_needs_nothing():
    multihost.start("127.0.0.1:1", num_processes=1, process_id=0)  # joins nobody
    with pytest.raises(RuntimeError, match=r"call sharding\.multihost\.start"):
        multihost._client()


@pytest.mark.parametrize(
    "arguments, environment, said",
    [
        ({"address": "x:1"}, {}, "JAX_NUM_PROCESSES, JAX_PROCESS_ID missing, beside JAX_COORD"),
        (
            {"address": "x:1", "num_processes": 2, "process_id": 2},
            {},
            "process_id=2, expected 0 to 1",
        ),
        ({}, {"JAX_PROCESS_ID": "first"}, "JAX_PROCESS_ID='first': expected a whole number"),
        ({}, {"JAX_PROCESS_ID": "1"}, "give all or none"),
    ],
)
def test_starts_that_are_refused(arguments, environment, said, monkeypatch: pytest.MonkeyPatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=said):
        multihost.start(**arguments)
