"""A run goes on behind a case that hangs, dies, or leaves a device that answers nobody."""

import json
import sys
from types import SimpleNamespace

import pytest

from benchmarks import reports
from benchmarks.records import ROOT
from benchmarks.reports import Report, hung, read, supervised

WORKER = """
import os, sys, time
from pathlib import Path
from types import SimpleNamespace
from benchmarks.reports import Report

path, reason = Path(sys.argv[1]), sys.argv[3] if len(sys.argv) > 2 else ""
report = Report.resumed(path, reason)
report.head = {"name": "work"}
ends = {"hangs": lambda: time.sleep(100), "dies": lambda: os._exit(9)}
cases = [SimpleNamespace(name=name) for name in os.environ["CASES"].split()]
for op, case in report.each([(SimpleNamespace(name="op"), case) for case in cases]):
    ends.get(case.name, int)()
    report.add([{"op": op.name, "case": case.name, "correct": True}])
report.write(right=sum(r["correct"] for r in report.records))
"""


def outcome(tmp_path, names, **limits):
    (tmp_path / "worker.py").write_text(WORKER)
    path = tmp_path / "report.json"
    how = supervised(
        [sys.executable, str(tmp_path / "worker.py"), str(path)], path,
        env={"PYTHONPATH": str(ROOT), "CASES": " ".join(names)},
        **{"patience": 3.0, "seconds": 60.0} | limits,
    )  # fmt: skip
    return how, read(path)


def test_a_case_that_hangs_or_dies_costs_only_itself(tmp_path):
    how, report = outcome(tmp_path, ["a", "hangs", "b", "dies", "c"])
    assert how == "well, behind 2 that ended it"
    assert [r["case"] for r in report["records"]] == ["a", "hangs", "b", "dies", "c"]
    assert [r.get("failed") for r in report["records"]] == [
        None, "no answer for 3 s", None, "exit 9", None,
    ]  # fmt: skip
    assert report["right"] == 3 and "running" not in report
    assert report["seconds"] > 3, "what hung has taken its time, too"
    assert hung(tmp_path / "report.json") == {("op", "hangs")}


def test_a_run_ends_with_its_time(tmp_path):
    how, report = outcome(tmp_path, ["a", "hangs", "b"], patience=60.0, seconds=3.0)
    assert how == "over 3 s"
    assert report["running"] == {"op": "op", "case": "hangs"}


def test_what_cannot_begin_is_not_begun_again(tmp_path):
    path, count = tmp_path / "report.json", tmp_path / "count"
    how = supervised(
        ["sh", "-c", "echo >> count; exit 3"], path, patience=5.0, seconds=30.0, cwd=tmp_path
    )
    assert how == "exit 3" and count.read_text() == "\n"


def test_a_device_that_answers_nobody_ends_the_process(tmp_path, monkeypatch):
    path = tmp_path / "report.json"
    report = Report(path)
    [(op, case)] = report.each([(SimpleNamespace(name="op"), SimpleNamespace(name="bad"))])
    failed = [{"op": op.name, "case": case.name, "failed": "illegal address"}]
    report.add(failed)  # the device adds: it was only this case
    monkeypatch.setattr(reports, "_ill", lambda: "illegal address")
    report.add([{"op": "op", "case": "good"}])
    with pytest.raises(SystemExit, match="answers nobody since: illegal"):
        report.add(failed)
    assert len(json.loads(path.read_text())["records"]) == 3
    later = Report.resumed(path, "exit 1")
    assert len(later.records) == 3, "no case was running"
    assert not list(later.each([(op, case)])) and not Report.resumed(path, "").records
