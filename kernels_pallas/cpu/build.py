"""Compiles the C++ kernels of this folder on first use and keeps the library in a cache.

A compilation takes seconds, so a server may ask first whether one is due (`find`), serve meanwhile,
and have it made (`library`) behind its first tokens.
"""

import contextlib
import hashlib
import logging
import os
import platform
import shlex
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterable
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
    if os.path.exists(path):  # which is False, not an error, behind a closed folder
        return path, True
    if why := _refusal(path.parent):
        _log.warning("native CPU kernels are off: %s; set JAXSERVE_CACHE_DIR to another", why)
        return None
    if why := _failed(path):
        _log.warning("native CPU kernels are off: %s", why)
        return None
    return path, False


def library() -> Path | None:
    """The compiled library, built now if need be; None, after one log line, if that fails.

    What the compiler objects to is kept beside the library's place: the next start does not try
    again until the sources, the compiler or the machine are others. A compiler that was stopped, or
    had no memory or disk, objects to nothing.
    """
    if (found := find()) is None:
        return None
    path, exists = found
    try:
        if not exists:
            _compile(_compiler() or ["c++"], path)
        return path
    except subprocess.CalledProcessError as error:
        command = shlex.join(_compiler() or [])
        reason = f"{command} failed with {error.returncode}: {error.stderr[-2000:]}"
        _log.warning("native CPU kernels are off: %s", reason)
        if _objects(error):
            _remember(path, reason)
    except OSError as error:
        _log.warning("native CPU kernels are off: %s", error)
    return None


def refuse(path: Path, error: Exception) -> None:
    """Says why a library cannot be used. One that was cut short is taken away, so that the next
    start builds it again; others may be well, and their folder such that nothing in it may run."""
    cut_short = ("file too short", "invalid ELF header", "undefined symbol")
    remedy = "set JAXSERVE_CACHE_DIR to a folder whose libraries may run"
    if any(x in str(error) for x in cut_short):
        remedy = "the next start builds it again"
        try:
            path.unlink(missing_ok=True)
        except OSError as stays:
            remedy = f"remove it by hand: {stays}"
    _log.warning("native CPU kernels are off: %s cannot be loaded (%s); %s", path, error, remedy)


def _objects(error: subprocess.CalledProcessError) -> bool:
    """Whether another try would end alike."""
    passing = ("Killed", "No space left", "out of memory", "Cannot allocate memory")
    said = error.stderr
    return error.returncode > 0 and "error:" in said and not any(x in said for x in passing)


def _failed(path: Path) -> str:
    """What the compiler objected to at an earlier start; empty if it did not."""
    try:
        return _failure(path).read_text() if _failure(path).exists() else ""
    except OSError as error:
        return f"{error}; make the folder readable, or set JAXSERVE_CACHE_DIR to another"


def _remember(path: Path, reason: str) -> None:
    try:
        _failure(path).write_text(f"{reason}\n(remove {_failure(path)} to try again)")
    except OSError as error:  # the next start asks the compiler again
        _log.warning("cannot note that: %s", error)


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
    """Changes with anything the library depends on: sources, jaxlib's headers, CPU, compiler, libc.

    Size and time of the compiler stand for its version, which takes a process to ask for.
    """
    stat = Path(compiler[0]).stat()
    parts = [jaxlib.version.__version__, _cpu(), " ".join(compiler), " ".join(_flags())]
    parts += [str(stat.st_size), str(stat.st_mtime_ns), *platform.libc_ver()]
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
        _run_all(
            [*nice, *compiler, *_flags(), include, "-c", str(source), "-o", str(target)]
            for source, target in zip(_sources(), objects, strict=True)
        )
        built = Path(folder) / "library.so"
        _run_all([[*compiler, *_flags(), "-shared", *map(str, objects), "-o", str(built)]])
        built.replace(path)


def _run_all(commands: Iterable[list[str]]) -> None:
    """Runs commands side by side, and ends those that are left when one fails.

    They have sessions of their own: Ctrl-C in a terminal is meant for the server, which may still
    be answering. Their words are English, for `_objects`.
    """
    with contextlib.ExitStack() as stack:
        jobs = [stack.enter_context(_start(command)) for command in commands]
        for job in jobs:
            stack.callback(_end, job)
        for job in jobs:
            _, stderr = job.communicate()
            if job.returncode:
                raise subprocess.CalledProcessError(job.returncode, job.args, stderr=stderr)


def _start(command: list[str]) -> subprocess.Popen[str]:
    env = os.environ | {"LC_ALL": "C"}
    return subprocess.Popen(
        command, env=env, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def _end(job: subprocess.Popen[str]) -> None:
    if job.poll() is None:
        os.killpg(job.pid, signal.SIGKILL)
