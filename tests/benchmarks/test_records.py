"""What a measurement is written down with, on machines that lack something."""

import subprocess

from benchmarks import records


def test_a_machine_need_not_have_git(monkeypatch):
    def absent(*_, **__):
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", absent)
    assert records.machine()["commit"] == "unknown"
