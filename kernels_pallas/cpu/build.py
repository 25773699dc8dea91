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

    None is said after one log line: they are off, nothing compiles C++ here, it failed before, or
    there is nowhere to keep what it makes.
    """
    if os.environ.get("JAXSERVE_NATIVE", "1") == "0":
        _log.info("native CPU kernels are off: JAXSERVE_NATIVE=0")
        return None
    compiler, root = _compiler(), cache_dir()
    if compiler is None:
        asked = os.environ.get("CXX")
        why = f"CXX={asked!r} is not found" if asked else "no C++ compiler"
        _log.warning("native CPU kernels are off: %s (install g++ or clang++)", why)
        return None
    if root is None:
        _log.warning("native CPU kernels are off: no home folder; set JAXSERVE_CACHE_DIR")
        return None
    path = root / "native" / f"{_fingerprint(compiler)}.so"
    exists = os.path.exists(path)  # which is False, not an error, behind a closed folder
    if not exists and (why := _refusal(path.parent)):
        _log.warning("native CPU kernels are off: %s; set JAXSERVE_CACHE_DIR to another", why)
        return None
    if _failure(path).exists():
        _log.warning("native CPU kernels are off: %s", _failure(path).read_text())
        return None
    return path, exists


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
            _compile(_compiler() or ["c++"], path)
        return path
    except subprocess.CalledProcessError as error:
        reason = f"{shlex.join(_compiler() or [])} failed: {error.stderr[-2000:]}"
        _failure(path).write_text(f"{reason}\n(remove {_failure(path)} to try again)")
        _log.warning("native CPU kernels are off: %s", reason)
    except OSError as error:
        _log.warning("native CPU kernels are off: %s", error)
    return None


def cache_dir() -> Path | None:
    """What this project keeps between processes: $JAXSERVE_CACHE_DIR, or ~/.cache/jaxserve.

    None where that is in a home folder and nobody knows which.
    """
    try:
        return Path(os.environ.get("JAXSERVE_CACHE_DIR") or "~/.cache/jaxserve").expanduser()
    except RuntimeError:  # HOME is not set, and the user has no entry
        return None


def _refusal(folder: Path) -> str | None:
    """Why nothing can be written to a folder, which is made if it is missing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return f"{folder} cannot be written ({error.strerror})"


def _compiler() -> list[str] | None:
    """$CXX, a program and perhaps arguments of it, or a compiler of the usual names."""
    if asked := os.environ.get("CXX"):
        try:
            program, *arguments = shlex.split(asked)
        except ValueError:  # nothing but blanks, or a quotation without end
            return None
        found = shutil.which(program)
    else:
        found, arguments = shutil.which("g++") or shutil.which("clang++"), []
    return None if found is None else [found, *arguments]


def _flags() -> list[str]:
    """JAXSERVE_CXXFLAGS come last and win: `make sanitize` is made of them."""
    return [*_FLAGS, *shlex.split(os.environ.get("JAXSERVE_CXXFLAGS", ""))]


def _failure(path: Path) -> Path:
    return path.with_suffix(".failed")


def _sources() -> list[Path]:
    return sorted(_FOLDER.glob("*.cc"))


def _fingerprint(compiler: list[str]) -> str:
    """Changes with anything the library depends on: sources, jaxlib's headers, CPU, compiler."""
    parts = [jaxlib.version.__version__, _cpu(), " ".join(compiler), " ".join(_flags())]
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


def _compile(compiler: list[str], path: Path) -> None:
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
                [*nice, *compiler, *_flags(), include, "-c", str(source), "-o", str(target)],
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
        link = [*compiler, *_flags(), "-shared", *map(str, objects), "-o", str(built)]
        subprocess.run(link, check=True, capture_output=True, text=True)
        built.replace(path)
