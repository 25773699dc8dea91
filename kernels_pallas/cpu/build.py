"""Compiles the C++ kernels of this folder on first use and keeps the library in a cache.

A compilation takes seconds, so a server may ask first whether one is due (`find`), serve meanwhile,
and have it made (`library`) behind its first tokens.
"""

import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import jax
import jaxlib.version

_FOLDER = Path(__file__).parent
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-ffp-contract=fast", "-fPIC", "-pthread")
_log = logging.getLogger(__name__)


def find() -> tuple[Path, bool] | None:
    """Where the library is or will be, and whether it exists; None if this machine has none.

    None is said after one log line: they are off, nothing compiles C++ here, or it failed before.
    """
    if os.environ.get("JAXSERVE_NATIVE", "1") == "0":
        _log.info("native CPU kernels are off: JAXSERVE_NATIVE=0")
        return None
    compiler = _compiler()
    if compiler is None:
        _log.warning("native CPU kernels are off: no C++ compiler (install g++ or clang++)")
        return None
    path = _cache_dir() / f"{_fingerprint(compiler)}.so"
    if _failure(path).exists():
        _log.warning("native CPU kernels are off: %s", _failure(path).read_text())
        return None
    return path, path.exists()


def library() -> Path | None:
    """The compiled library, built now if need be; None, after one log line, if that fails.

    What the compiler objects to is kept beside the library's place: the next start does not try
    again until the sources, the compiler or the machine are others.
    """
    if (found := find()) is None:
        return None
    path, exists = found
    try:
        if not exists:
            _compile(_compiler() or "c++", path)
        return path
    except subprocess.CalledProcessError as error:
        reason = f"{_compiler()} failed: {error.stderr[-2000:]}"
        _failure(path).write_text(f"{reason}\n(remove {_failure(path)} to try again)")
        _log.warning("native CPU kernels are off: %s", reason)
    except OSError as error:
        _log.warning("native CPU kernels are off: %s", error)
    return None


def _compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")


def _flags() -> list[str]:
    """JAXSERVE_CXXFLAGS come last and win: `make sanitize` is made of them."""
    return [*_FLAGS, *shlex.split(os.environ.get("JAXSERVE_CXXFLAGS", ""))]


def _failure(path: Path) -> Path:
    return path.with_suffix(".failed")


def _cache_dir() -> Path:
    root = os.environ.get("JAXSERVE_CACHE_DIR") or Path.home() / ".cache" / "jaxserve"
    return Path(root) / "native"


def _sources() -> list[Path]:
    return sorted(_FOLDER.glob("*.cc"))


def _fingerprint(compiler: str) -> str:
    """Changes with anything the library depends on: sources, jaxlib's headers, CPU, compiler."""
    parts = [jaxlib.version.__version__, _cpu(), compiler, " ".join(_flags())]
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
    """One object per source, in parallel; the rename makes concurrent builders harmless.

    The compilers yield to everybody else: a server may be answering already.
    """
    nice = [tool, "-n", "10"] if (tool := shutil.which("nice")) else []
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        objects = [Path(folder) / f"{source.stem}.o" for source in _sources()]
        include = f"-isystem{jax.ffi.include_dir()}"
        jobs = [
            subprocess.Popen(
                [*nice, compiler, *_flags(), include, "-c", str(source), "-o", str(target)],
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
        link = [compiler, *_flags(), "-shared", *map(str, objects), "-o", str(built)]
        subprocess.run(link, check=True, capture_output=True, text=True)
        built.replace(path)
