"""Rejection sampling with a live engine makes the model better at problems it never saw."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_pass_at_1_rises():
    command = [sys.executable, "examples/rejection_sampling.py", "--rounds", "2"]
    sizes = ["--problems", "1000", "--steps", "80", "--held-out", "200"]
    done = subprocess.run([*command, *sizes], cwd=ROOT, capture_output=True, text=True, check=True)
    versions = re.findall(r"weights (\d+): .* \(([+-][\d.]+) to", done.stdout)
    assert [version for version, _ in versions] == ["1", "2"]
    assert float(versions[-1][1]) > 0, done.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["nowhere"], "nowhere/recipe.toml is not there; give a folder such as"),
        (["--held-out", "1"], "--held-out 1: an interval needs at least 2"),
    ],
)
def test_what_cannot_be_judged_is_refused_before_anything_is_loaded(
    options: list[str], message: str
):
    command = [sys.executable, "examples/rejection_sampling.py", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and message in done.stderr
    assert "Traceback" not in done.stderr
