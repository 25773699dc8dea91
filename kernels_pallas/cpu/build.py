"""Compiles the C++ kernels of this folder on first use and keeps the library in a cache."""

import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import jax
import jaxlib.version

_FOLDER = Path(__file__).parent
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-ffp-contract=fast", "-fPIC", "-pthread")
_log = logging.getLogger(__name__)


def library() -> Path | None:
    """The compiled library, built now if need be; None, after one log line, if that fails."""
    if os.environ.get("JAXSERVE_NATIVE", "1") == "0":
        _log.info("native CPU kernels are off: JAXSERVE_NATIVE=0")
        return None
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
    if compiler is None:
        _log.warning("native CPU kernels are off: no C++ compiler (install g++ or clang++)")
        return None
    try:
        path = _cache_dir() / f"{_fingerprint(compiler)}.so"
        if not path.exists():
            _compile(compiler, path)
        return path
    except subprocess.CalledProcessError as error:
        _log.warning("native CPU kernels are off: %s failed: %s", compiler, error.stderr[-2000:])
    except OSError as error:
        _log.warning("native CPU kernels are off: %s", error)
    return None


def _cache_dir() -> Path:
    root = os.environ.get("JAXSERVE_CACHE_DIR") or Path.home() / ".cache" / "jaxserve"
    return Path(root) / "native"


def _sources() -> list[Path]:
    return sorted(_FOLDER.glob("*.cc"))


def _fingerprint(compiler: str) -> str:
    """Changes with anything the library depends on: sources, jaxlib's headers, CPU, compiler."""
    parts = [jaxlib.version.__version__, _cpu(), compiler, " ".join(_FLAGS)]
    parts += [p.read_text() for p in sorted(_FOLDER.glob("*.h")) + _sources()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def _cpu() -> str:
    """Architecture and instruction sets: -march=native must not meet another machine's cache."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine() + platform.processor()
    named = ("model name", "flags", "Features", "CPU part")
    return platform.machine() + "".join(sorted({x for x in lines if x.startswith(named)}))


def _compile(compiler: str, path: Path) -> None:
    """One object per source, in parallel; the rename makes concurrent builders harmless."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        objects = [Path(folder) / f"{source.stem}.o" for source in _sources()]
        include = f"-isystem{jax.ffi.include_dir()}"
        jobs = [
            subprocess.Popen(
                [compiler, *_FLAGS, include, "-c", str(source), "-o", str(target)],
                stderr=subprocess.PIPE,
                text=True,
            )
            for source, target in zip(_sources(), objects, strict=True)
        ]
        for job in jobs:
            _, stderr = job.communicate()
            if job.returncode:
                raise subprocess.CalledProcessError(job.returncode, job.args, stderr=stderr)
        built = Path(folder) / "library.so"
        link = [compiler, "-shared", "-pthread", *map(str, objects), "-o", str(built)]
        subprocess.run(link, check=True, capture_output=True, text=True)
        built.replace(path)
