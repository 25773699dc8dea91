"""Processes of their own, as malloc has its settings from the start."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FAULTS_OF_TEN_STEPS = """
import resource, sys
from jaxserve.cli.huge_pages import restart_with_huge_pages
print("began", sys.argv[1:])
if sys.argv[1] == "huge":
    restart_with_huge_pages()
import jax, jax.numpy as jnp
from jax import lax
step = jax.jit(lambda x: lax.optimization_barrier(jnp.outer(x, x)).sum(0))  # 256 MiB between
x = jnp.arange(8192.0)
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step(x).block_until_ready()
before = faults()
for _ in range(10):
    step(x).block_until_ready()
print(faults() - before)
"""


def run(how: str, **environment: str) -> list[str]:
    clean = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    done = subprocess.run(
        [sys.executable, "-u", "-c", FAULTS_OF_TEN_STEPS, how, "an argument"],
        capture_output=True, text=True, env=clean | environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_a_process_starts_over_once_and_touches_few_pages():
    *began, few = run("huge")
    assert began == ["began ['huge', 'an argument']"] * 2
    assert run("huge", GLIBC_TUNABLES="glibc.malloc.hugetlb=0")[:-1] == began[:1], "its own choice"
    allowed = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not allowed.exists() or "[never]" in allowed.read_text():
        pytest.skip("no huge pages here")
    many = run("plain")[-1]
    assert int(few) < 0.1 * int(many)
