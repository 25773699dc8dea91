"""A run goes on behind a case that hangs, dies, or leaves a device that answers nobody."""

import json
import sys
from types import SimpleNamespace

import pytest

from benchmarks import reports
from benchmarks.records import ROOT
from benchmarks.reports import Report, fatal, read, supervised

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
    assert fatal(tmp_path / "report.json") == {("op", "hangs", ""), ("op", "dies", "")}


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


def test_the_first_body_that_lost_a_card_is_the_one_to_leave_out(tmp_path):
    path, line = tmp_path / "r.json", {"op": "o", "case": "c", "correct": False}
    lost = {"failed": "JaxRuntimeError: INTERNAL: CUDA_ERROR_ILLEGAL_ADDRESS: an illegal"}
    Report(path, records=[
        line | {"body": "a", "correct": True},
        line | {"body": "b"} | lost,
        line | {"body": "c"} | lost,
        line | {"case": "timed", "contestant": "torch", "kind": "library"} | lost,
        line | {"case": "tiles", "contestant": "b rows=8", "kind": "body"} | lost,
        line | {"case": "race"} | lost,
        line | {"case": "refused", "body": "b", "failed": "UnsupportedError: an odd width"},
        line | {"case": "wrong", "body": "b", "wrong": "off by 3"},
    ]).write()  # fmt: skip
    assert fatal(path) == {("o", "c", "b"), ("o", "tiles", "b"), ("o", "race", "")}
    assert fatal(tmp_path / "none.json") == set()


AHEAD = """
import os, sys, time
from pathlib import Path
from types import SimpleNamespace
from benchmarks.reports import Report

report = Report.resumed(Path(sys.argv[1]), sys.argv[3] if len(sys.argv) > 2 else "")
cases = [(SimpleNamespace(name="op"), SimpleNamespace(name=name)) for name in "abcd"]

def ahead(part, done):
    for _, case in part:
        done()
        time.sleep(0.3)
        if case.name == "c":
            os._exit(9)

for op, case in report.parts(cases, 2, ahead):
    if case.name == "c":
        os._exit(8)
    report.add([{"op": op.name, "case": case.name, "alone": report.alone}])
report.write()
"""


def test_what_dies_while_it_compiles_ahead_goes_on_case_by_case(tmp_path):
    (tmp_path / "worker.py").write_text(AHEAD)
    path = tmp_path / "report.json"
    how = supervised(
        [sys.executable, str(tmp_path / "worker.py"), str(path)], path, patience=10.0,
        seconds=60.0, env={"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert how == "well, behind 2 that ended it"
    found = {r["case"]: r.get("failed", r.get("alone")) for r in read(path)["records"]}
    assert found == {"a": False, "b": False, "c": "exit 8", "d": False}


def test_a_start_may_take_longer_than_a_case(tmp_path):
    """Until something is written a process has twice the patience."""
    path, late = tmp_path / "report.json", "import time; time.sleep({})"
    command = [sys.executable, "-c", late.format(3)]
    assert supervised(command, path, patience=2.5, seconds=30.0) == "well"
    command = [sys.executable, "-c", late.format(60)]
    assert supervised(command, path, patience=1.0, seconds=30.0) == "no answer for 2 s"


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
