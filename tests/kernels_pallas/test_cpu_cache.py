"""Where the native kernels are kept and what compiles them, as the environment has it."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest

from kernels_pallas.cpu import build

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="compilers have other names")


@pytest.fixture
def said(monkeypatch, tmp_path, caplog):
    """Asks for the library with these variables set: what was found, and what the log says."""
    compiler = tmp_path / "compiler"
    compiler.write_text("#!/bin/sh\nexit 1\n")
    compiler.chmod(0o755)
    caplog.set_level(logging.WARNING, "kernels_pallas.cpu.build")
    monkeypatch.delenv("JAXSERVE_NATIVE", raising=False)

    def ask(**environment):
        defaults = {"CXX": str(compiler), "JAXSERVE_CACHE_DIR": str(tmp_path / "cache")}
        for name, value in {**defaults, **environment}.items():
            monkeypatch.setenv(name, value)
        return build.find(), caplog.text

    return ask


def test_a_cache_that_cannot_be_written_leaves_no_native_kernels(said, tmp_path):
    (tmp_path / "file").write_text("")  # no folder can be made in it, by nobody
    found, log = said(JAXSERVE_CACHE_DIR=str(tmp_path / "file" / "cache"))
    assert found is None
    assert f"{tmp_path / 'file' / 'cache' / 'native'} cannot be written" in log
    assert "JAXSERVE_CACHE_DIR" in log


def test_a_library_that_is_there_needs_no_writing(said, monkeypatch):
    (path, exists), _ = said()
    assert not exists
    path.write_text("")
    monkeypatch.setattr(build, "_refusal", lambda folder: f"{folder} cannot be written")
    assert said() == ((path, True), "")


def test_a_compiler_may_have_arguments(said, tmp_path):
    plain, _ = said()
    found, log = said(CXX=f"{tmp_path / 'compiler'} -m64 '-DA=b c'")
    assert found is not None and not log
    assert found != plain, "another machine code may come of it"
    assert build._compiler() == [str(tmp_path / "compiler"), "-m64", "-DA=b c"]


@pytest.mark.parametrize("asked", ["g++-99", "  ", "g++ 'open"])
def test_a_compiler_that_is_not_there_is_named(said, asked):
    found, log = said(CXX=asked)
    assert found is None
    assert f"CXX={asked!r} is not found" in log


def test_one_folder_is_kept_by_everything(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for asked in ("", "~/.cache/jaxserve"):
        monkeypatch.setenv("JAXSERVE_CACHE_DIR", asked)
        assert build.cache_dir() == tmp_path / ".cache" / "jaxserve"


def test_a_user_without_a_home_is_told_what_to_set(said, monkeypatch):
    def nobody(_):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", nobody)
    found, log = said(JAXSERVE_CACHE_DIR="")
    assert found is None
    assert "no home folder; set JAXSERVE_CACHE_DIR" in log
