"""Native CPU kernels where there is nothing to sum, or no memory to do it in."""

import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import cpu
from kernels_pallas.weight import Int8Weight

pytestmark = pytest.mark.skipif(not cpu.available(), reason="no C++ compiler")

SANITIZED = "sanitize" in os.environ.get("JAXSERVE_CXXFLAGS", "")


def weight(dtype, *shape):
    if dtype == "int8":
        return Int8Weight(jnp.ones(shape, jnp.int8), jnp.ones(shape[:-1], jnp.float32))
    return jnp.ones(shape, dtype)


def dirty(*shape):
    """Memory that is handed out next may have been this, which is no zero."""
    return [np.full(shape, 7, np.float32) + jnp.ones(shape) for _ in range(4)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("rows", [1, 70])
@pytest.mark.parametrize("cols", [64, 70])
def test_a_sum_of_nothing_is_zero(dtype, rows, cols):
    w, x = weight(dtype, cols, 0), jnp.zeros((rows, 0))
    scales, w = ((w.scale,), w.values) if dtype == "int8" else ((), w)
    dirty(rows, cols)
    want = np.zeros((rows, cols))
    np.testing.assert_array_equal(cpu.linear(x, (w,), scales=scales)[0], want)
    np.testing.assert_array_equal(cpu.gated_linear(x, w, w, scales=scales * 2), want)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize(("mlp", "embed"), [(0, 40), (40, 0), (0, 0)])
def test_experts_of_nothing_say_zero(dtype, mlp, embed):
    up, down = weight(dtype, 3, mlp, embed), weight(dtype, 3, embed, mlp)
    scales = (up.scale, up.scale, down.scale) if dtype == "int8" else ()
    up, down = (w.values if dtype == "int8" else w for w in (up, down))
    ids = jnp.asarray([[0, 2], [1, 0]], jnp.int32)
    dirty(2, 40)
    found = cpu.experts(jnp.ones((2, embed)), ids, jnp.ones((2, 2)), up, up, down, scales=scales)
    np.testing.assert_array_equal(found, np.zeros((2, embed)))


def test_rows_of_nothing_are_normed():
    assert cpu.rms_norm(jnp.ones((3, 0)), jnp.ones(0), eps=1e-6).shape == (3, 0)


SCRIPT = """
import resource
from pathlib import Path
import jax.numpy as jnp
import numpy as np
from kernels_pallas import cpu

K = 1 << 21

def ones(cols, k):
    return jnp.ones((cols, k), jnp.bfloat16)

def limited(*operands):
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (8 << 20), resource.RLIM_INFINITY))
    try:
        for y in cpu.linear(*operands):
            y.block_until_ready()
        return "served"
    except Exception as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

assert cpu.available()
cpu.linear(ones(1, 32), (ones(512, 32),))[0].block_until_ready()  # threads are there
x, whole, odd = ones(1, K), ones(16, K), ones(3, K)
for what, weights in (("rows", (whole,)), ("chunks", (odd, odd))):  # that there is no room for
    said = limited(x, weights)
    assert "RESOURCE_EXHAUSTED" in said and "no memory for what a CPU kernel works in" in said, said
    for w, y in zip(weights, cpu.linear(x, weights)):
        np.testing.assert_array_equal(y, np.full((1, len(w)), K))
    print(what)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits memory, and reads /proc")
@pytest.mark.skipif(SANITIZED, reason="a sanitizer has terabytes of addresses")
def test_no_memory_to_work_in_is_an_error_and_the_next_call_is_served():
    environment = {
        "JAX_PLATFORMS": "cpu", "JAXSERVE_NUM_THREADS": "2",
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "131072",  # nothing is put by
    }  # fmt: skip
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=os.environ | environment, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert (run.returncode, run.stdout.split()) == (0, ["rows", "chunks"]), run.stderr


REFUSED = """
import resource, time, jax, jax.numpy as jnp
from pathlib import Path
from kernels_pallas import cpu
assert cpu.available()
x, w = jnp.ones((4, 64)), jnp.ones((256, 64))
run = jax.jit(lambda x: cpu.linear(x, (w,))[0]).lower(x).compile()
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20), resource.RLIM_INFINITY))
y = run(x)
time.sleep(1)
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(y.sum())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits memory, and reads /proc")
@pytest.mark.skipif(SANITIZED, reason="a sanitizer has terabytes of addresses")
@pytest.mark.timeout(200)
def test_helpers_that_the_system_refuses_are_done_without():
    environment = {
        "JAX_PLATFORMS": "cpu", "JAXSERVE_NUM_THREADS": "200",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }  # fmt: skip
    run = subprocess.run(
        [sys.executable, "-c", REFUSED], env=os.environ | environment, capture_output=True,
        text=True, check=False, timeout=60,
    )  # fmt: skip
    assert (run.returncode, run.stdout.strip()) == (0, str(4 * 256 * 64.0)), run.stderr
    assert "the system refused another" in run.stderr


GROWTH = """
import resource, jax, jax.numpy as jnp
from pathlib import Path
from kernels_pallas import cpu

assert cpu.available()
T, A, D, F = 1024, 8, 1024, 128
ids = jnp.tile(jnp.arange(A, dtype=jnp.int32), (T, 1))
w = [jnp.zeros(s, jnp.bfloat16) for s in ((A, F, D), (A, F, D), (A, D, F))]
share = jnp.full((T, A), 1 / A)

def layers(x):
    for _ in range(3):
        x = x + cpu.experts(x, ids, share, *w)
    return x

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

x = jnp.ones((T, D))
run = jax.jit(layers).lower(x).compile()
for i in range(40):
    x = run(x).block_until_ready()
    if i == 0:
        before = resident()
print((resident() - before) / (T * A * D * 6))  # a sum and a row of bfloat16 for each expert asked
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.skipif(SANITIZED, reason="a sanitizer keeps what is freed")
def test_calls_of_many_threads_take_turns_with_one_working_memory():
    environment = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).parents[2])}
    run = subprocess.run(
        [sys.executable, "-c", GROWTH], env=os.environ | environment, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) < 1.5, "XLA's threads call in turn: the first call's memory is enough"
