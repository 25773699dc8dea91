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
