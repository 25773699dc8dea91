"""Trees of this project side by side: what is made of their seconds, and folders that are none."""

import argparse
from pathlib import Path

import pytest

from benchmarks import versions
from benchmarks.records import ROOT


def test_a_process_that_is_always_slow_counts_half_and_each_round_by_itself():
    one = versions.means([4.0, 1.0], [1.0, 9.0])
    assert one == [2.0, 3.0]
    found = versions.speeds({Path("a"): one, Path("b"): [1.0, 3.0]})
    assert found == {Path("a"): [1.0, 1.0], Path("b"): [1.0, 2.0]}


def test_a_folder_that_is_no_tree_is_refused(tmp_path):
    assert versions.a_tree(str(ROOT)) == ROOT
    (tmp_path / "jaxserve").mkdir()
    with pytest.raises(
        argparse.ArgumentTypeError, match="no tree of jaxserve: it has no benchmarks"
    ):
        versions.a_tree(str(tmp_path))
