"""How tests run: on CPU, with strict dtypes, and with compiled programs kept between runs.

One CPU device is the default: XLA divides its threads among virtual devices, so eight of them
would slow every test down for the sake of the few that need a mesh. Those are marked `mesh`, and
each runs in a process of its own, with eight devices or as many as `mesh(10)` asks for.
`JAX_NUM_CPU_DEVICES=10 pytest -m mesh` runs them all in one.

Ranks are promoted: a norm's scale [D] times activations [B, T, D] is the models' plain notation.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

hypothesis.settings.register_profile("jaxserve", deadline=None)  # first calls compile
hypothesis.settings.load_profile("jaxserve")

_DEVICES = "JAX_NUM_CPU_DEVICES"
_DEFAULTS = {
    "JAX_PLATFORMS": "cpu",
    "JAX_NUMPY_DTYPE_PROMOTION": "strict",
    "JAX_COMPILATION_CACHE_DIR": str(Path(__file__).parents[1] / ".jaxserve-cache" / "tests"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    "HF_HUB_OFFLINE": "1",
    "NPROC": str(max(8, os.cpu_count() or 1)),  # a simulated GPU's warpgroups wait for each other
}
for name, value in _DEFAULTS.items():  # before JAX is imported; a caller's own settings win
    os.environ.setdefault(name, value)


_START = time.monotonic()


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "start no test marked slow later than this many seconds into the run"
    parser.addoption("--slow", type=float, default=float("inf"), metavar="SECONDS", help=text)


def pytest_runtest_setup(item: pytest.Item) -> None:
    over = time.monotonic() - _START > item.config.getoption("--slow")
    if over and item.get_closest_marker("slow"):
        pytest.skip("slow, and its time is over: --slow")


@pytest.fixture
def no_compilation_cache() -> Iterator[None]:
    """For tests that compile for absent devices: their programs cannot be read back."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Runs a test marked `mesh` where there are enough devices."""
    marker = pyfuncitem.get_closest_marker("mesh")
    needed = 0 if marker is None else (marker.args or (8,))[0]
    if int(os.environ.get(_DEVICES, "1")) >= needed:
        return None
    child = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--no-header", pyfuncitem.nodeid],
        cwd=pyfuncitem.config.rootpath,
        env={**os.environ, _DEVICES: str(needed)},
        capture_output=True,
        text=True,
    )
    if child.returncode:
        pytest.fail(child.stdout + child.stderr, pytrace=False)
    return True
