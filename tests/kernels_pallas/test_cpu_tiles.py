"""Products by the tiles of Intel's AMX: in memory on any CPU with AVX-512, and refused by Linux."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kernels_pallas import cpu

SCRIPT = """
import ctypes, sys
import jax, jax.numpy as jnp, numpy as np
from kernels_pallas import cpu
from kernels_pallas.quantize import quantize_rows

if sys.argv[2] == "refused":  # Linux gives no tiles where they do not fit a stack for signals
    stack = (ctypes.c_char * 2048)()
    class Stack(ctypes.Structure):
        _fields_ = [("at", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]
    small = Stack(ctypes.addressof(stack), 0, 2048)
    assert ctypes.CDLL(None).sigaltstack(ctypes.byref(small), None) == 0
assert cpu.has_tiles() == (sys.argv[2] == "tiles"), cpu.has_tiles()
normal = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape)
out = {}
for rows in (1, 5, 16, 33, 150, 330):
    x = normal(rows, rows, 320)
    ids = jax.random.randint(jax.random.key(rows), (rows, 2), 0, 5)
    share = jnp.full((rows, 2), 0.5)
    w = [normal(i, 5, *s) for i, s in enumerate([(96, 320), (96, 320), (320, 96)])]
    for kind in ("int8", "bfloat16"):
        if kind == "int8":
            w8 = [quantize_rows(m) for m in w]
            m, scales = [v for v, _ in w8], [s for _, s in w8]
        else:
            m, scales = [v.astype(jnp.bfloat16) for v in w], []
        name = f"{kind}-{rows}-"
        one = tuple(s[0] for s in scales[:1])
        out[name + "linear"] = cpu.linear(x, (m[0][0],), scales=one)[0]
        residual = normal(rows + 1, rows, 96)
        added = cpu.linear(x, (m[0][0],), scales=one, residual=residual)[0]
        out[name + "added"] = added
        pair = tuple(s[0] for s in scales[:2])
        gated = cpu.gated_linear(x, m[0][0], m[1][0], scales=pair, activation="silu")
        out[name + "gated"] = gated
        out[name + "experts"] = cpu.experts(x, ids, share, *m, scales=tuple(scales))
    shape = 1, 16, 2, 32, 64
    k, v = (normal(i, rows, 2, 64) for i in (7, 8))
    pages = [jnp.zeros(shape, jnp.bfloat16)] * 2
    args = jnp.array([0, rows]), jnp.array([rows]), jnp.arange(16)[None], 1
    attended = cpu.paged_attention(normal(9, rows, 4, 64), k, v, *pages, 0, *args, scale=0.125)
    out[f"bfloat16-{rows}-attention"], out[f"bfloat16-{rows}-lse"] = attended[:2]
np.savez(sys.argv[1], **{k: np.asarray(v, np.float32) for k, v in out.items()})
"""

EMULATED = "-DJAXSERVE_EMULATED_TILES"


def results(path: Path, kind: str, flags: str = "") -> dict[str, np.ndarray]:
    env = os.environ | {"JAXSERVE_CXXFLAGS": flags, "PYTHONFAULTHANDLER": ""}
    command = [sys.executable, "-c", SCRIPT, str(path), kind]
    run = subprocess.run(command, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return dict(np.load(path))


def assert_alike(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    """Integers to the bit, floats as far as their order lets them."""
    assert found.keys() == wanted.keys()
    for name, want in wanted.items():
        if name.startswith("int8"):
            np.testing.assert_array_equal(found[name], want, name)
        else:
            error = np.abs(found[name] - want).max() / np.abs(want).max()
            assert error < (1e-2 if "experts" in name or "attention" in name else 1e-5), name


def avx512() -> bool:
    info = Path("/proc/cpuinfo")
    return info.exists() and "avx512f" in info.read_text()


@pytest.mark.slow
@pytest.mark.skipif(not (cpu.available() and avx512()), reason="no C++ compiler, or no AVX-512")
def test_tiles_in_memory_agree_with_everybody(tmp_path: Path):
    plain = results(tmp_path / "plain.npz", "plain", "-mno-amx-int8 -mno-amx-bf16")
    emulated = results(tmp_path / "emulated.npz", "tiles", EMULATED)
    assert_alike(emulated, plain)
    assert any((emulated[name] != plain[name]).any() for name in plain)  # they were tiles indeed
    if cpu.has_tiles():
        real = results(tmp_path / "real.npz", "tiles")
        for name, want in real.items():
            np.testing.assert_array_equal(emulated[name], want, name)


@pytest.mark.skipif(not cpu.has_tiles(), reason="no AMX here")
def test_where_linux_refuses_tiles_products_are_as_elsewhere(tmp_path: Path):
    refused = results(tmp_path / "refused.npz", "refused")
    assert_alike(refused, results(tmp_path / "tiles.npz", "tiles"))
