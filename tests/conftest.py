"""How tests run: on CPU, with strict dtypes, and with compiled programs kept between runs.

One CPU device is the default: XLA divides its threads among virtual devices, so eight of them would
slow every test down for the sake of the few that need a mesh. Those are marked `mesh`, and each runs
in a process of its own. `JAX_NUM_CPU_DEVICES=8 pytest -m mesh` runs them all in one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

_DEVICES = "JAX_NUM_CPU_DEVICES"
_DEFAULTS = {
    "JAX_PLATFORMS": "cpu",
    "JAX_NUMPY_DTYPE_PROMOTION": "strict",
    "JAX_COMPILATION_CACHE_DIR": str(Path(__file__).parents[1] / ".jaxserve-cache" / "tests"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    "HF_HUB_OFFLINE": "1",
}
for name, value in _DEFAULTS.items():  # before JAX is imported; a caller's own settings win
    os.environ.setdefault(name, value)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Runs a test marked `mesh` where there are eight devices."""
    if pyfuncitem.get_closest_marker("mesh") is None or os.environ.get(_DEVICES) == "8":
        return None
    child = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--no-header", pyfuncitem.nodeid],
        cwd=pyfuncitem.config.rootpath,
        env={**os.environ, _DEVICES: "8"},
        capture_output=True,
        text=True,
    )
    if child.returncode:
        pytest.fail(child.stdout + child.stderr, pytrace=False)
    return True
