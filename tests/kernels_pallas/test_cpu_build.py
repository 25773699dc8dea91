"""Native CPU kernels whose compiler or library fails: an answer and a log line, no exception."""

import logging
import os
import time
from pathlib import Path

import pytest

from kernels_pallas import cpu
from kernels_pallas.cpu import build


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """Writes a script that stands for the compiler; the cache is a folder of its own."""
    script = tmp_path / "compiler"
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setenv("JAXSERVE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("JAXSERVE_NATIVE", raising=False)

    def write(*lines):
        script.write_text("\n".join(["#!/bin/sh", *lines]) + "\n")
        script.chmod(0o755)
        os.utime(script, (1, 1))

    write("exit 1")
    return write


def markers(tmp_path):
    return list((tmp_path / "cache" / "native").glob("*.failed"))


@pytest.mark.parametrize(
    "lines",
    [
        ["kill -INT $$"],
        ["kill -TERM $$"],
        ["echo 'g++: fatal error: Killed signal terminated program cc1plus' >&2", "exit 1"],
        ["echo 'fatal error: error writing to x.o: No space left on device' >&2", "exit 1"],
        ["echo 'cc1plus: error: out of memory allocating 65536 bytes' >&2", "exit 1"],
    ],
)
def test_a_compiler_that_is_stopped_is_asked_again(compiler, tmp_path, lines):
    compiler(*lines)
    assert build.library() is None
    assert markers(tmp_path) == []
    assert build.find() is not None


def test_what_a_compiler_objects_to_is_remembered_until_a_library_is_there(compiler, tmp_path):
    compiler("echo 'kernel.cc:1: error: no such luck' >&2", "exit 1")
    assert build.library() is None
    (marker,) = markers(tmp_path)
    assert "no such luck" in marker.read_text()
    assert build.find() is None
    library = marker.with_suffix(".so")
    library.write_bytes(b"built by another start")
    assert build.find() == (library, True)


def test_another_compiler_in_the_same_place_is_another_library(compiler):
    before = build.find()
    compiler("# of another size", "exit 1")
    assert build.find() != before


def test_compilers_do_not_hear_ctrl_c_and_end_with_the_first_that_fails(compiler, tmp_path):
    log = tmp_path / "pids"
    first = build._sources()[0].name
    compiler(
        f'case "$*" in *{first}*) sleep 1; exit 1;; esac', f"echo $$ >> {log}", "exec sleep 60"
    )
    started = time.monotonic()
    assert build.library() is None
    assert time.monotonic() - started < 50
    pids = [int(line) for line in log.read_text().split()]
    assert pids
    for pid in pids:
        assert not Path(f"/proc/{pid}").exists()


def test_sessions_of_compilers_are_their_own(compiler, tmp_path):
    compiler(f"cut -d' ' -f6 /proc/self/stat >> {tmp_path}/sessions", "exit 1")
    assert build.library() is None
    assert str(os.getsid(0)) not in (tmp_path / "sessions").read_text().split()


def test_a_cache_that_cannot_be_read(compiler, monkeypatch, caplog):
    def exists(path, **_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "exists", exists)
    assert build.find() is None
    assert build.library() is None
    assert "JAXSERVE_CACHE_DIR" in caplog.text


def test_a_marker_that_cannot_be_written(compiler, tmp_path, monkeypatch, caplog):
    compiler("echo 'kernel.cc:1: error: no such luck' >&2", "exit 1")

    def write_text(path, text, **_):
        path.touch()
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_text", write_text)
    assert build.library() is None
    assert "No space left" in caplog.text
    assert build.find() is not None, "an empty marker says nothing"


@pytest.mark.parametrize("content", [b"", b"no library" * 99])
def test_a_library_that_is_none_is_built_again(compiler, caplog, content):
    path, _ = build.find()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    assert not cpu.available.__wrapped__()
    assert "cannot be loaded" in caplog.text
    assert not path.exists()


def test_a_library_that_may_not_run_stays(compiler, monkeypatch, caplog):
    path, _ = build.find()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"well")

    def load(name):
        raise OSError(f"{name}: failed to map segment from shared object")

    monkeypatch.setattr(cpu.ctypes, "CDLL", load)
    with caplog.at_level(logging.WARNING):
        assert not cpu.available.__wrapped__()
    assert "JAXSERVE_CACHE_DIR" in caplog.text
    assert path.exists()
