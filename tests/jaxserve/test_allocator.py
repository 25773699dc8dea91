"""Faults of pages are counted in processes of their own, as the setting has no way back."""

import subprocess
import sys

import pytest

FAULTS_OF_TEN_STEPS = """
import resource, sys, jax, jax.numpy as jnp
from jax import lax
from jaxserve.allocator import keep_freed_memory
if sys.argv[1] == "keep" and not keep_freed_memory():
    sys.exit(77)
step = jax.jit(lambda x: lax.optimization_barrier(jnp.outer(x, x)).sum())  # 256 MiB in between
x = jnp.arange(8192.0)
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(2):
    step(x).block_until_ready()
before = faults()
for _ in range(10):
    step(x).block_until_ready()
print(faults() - before)
"""


def faults(how: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", FAULTS_OF_TEN_STEPS, how], capture_output=True, text=True
    )
    if done.returncode == 77:
        pytest.skip("not glibc")
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_steps_find_the_memory_that_earlier_ones_gave_back():
    kept = faults("keep")
    assert kept < 0.1 * faults("return"), "each step has its own temporaries mapped anew"
