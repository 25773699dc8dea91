"""The plan for an accelerator runs whole, tiny, on CPU; and a bad stage costs only itself."""

import json

import pytest

from benchmarks import accelerator
from benchmarks.accelerator import Stage, run, stages
from benchmarks.order import GOALS


def test_parts_fit_into_ten_minutes(tmp_path):
    for part in (1, 2):
        planned = stages(part, tmp_path, smoke=False, device="auto")
        assert sum(stage.seconds for stage in planned) <= 580.001
        assert len({stage.name for stage in planned}) == len(planned)


def test_a_stage_that_fails_or_hangs_does_not_end_the_part(tmp_path, monkeypatch):
    commands = {
        "slow": "import time; time.sleep(60)",
        "bad": "print('no card'); exit(3)",
        "good": "",
    }
    for name, code in commands.items():
        (tmp_path / f"stage_{name}.py").write_text(code)
    monkeypatch.setattr(accelerator, "ROOT", tmp_path)
    planned = [Stage(name, f"stage_{name}", [], 5 if name == "slow" else 30) for name in commands]
    monkeypatch.setattr(accelerator, "stages", lambda *_, **__: planned)
    ended = run(1, tmp_path / "out")
    assert [stage["ended"] for stage in ended] == ["over 5 s", "exit 3", "well"]
    assert [stage.get("said") for stage in ended] == [None, "no card", None]
    written = json.loads((tmp_path / "out" / "stages-1.json").read_text())
    assert written["stages"] == ended


def test_what_a_stage_leaves_of_its_time_is_given_on_and_programs_are_kept(tmp_path, monkeypatch):
    code = """
import json, os, sys
told = sys.argv[sys.argv.index("--budget-seconds") + 1]
cache = os.environ["JAX_COMPILATION_CACHE_DIR"]
with open(sys.argv[1], "a") as f:
    f.write(json.dumps([int(told), cache, sorted(os.listdir(cache))]) + "\\n")
open(os.path.join(cache, "program"), "a").close()
"""
    (tmp_path / "stage.py").write_text(code)
    seen = tmp_path / "seen"
    monkeypatch.setattr(accelerator, "ROOT", tmp_path)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    planned = [Stage(str(i), "stage", [str(seen)], 100, budget=1000) for i in range(2)]
    monkeypatch.setattr(accelerator, "stages", lambda *_, **__: planned)
    assert [stage["ended"] for stage in run(1, tmp_path / "out")] == ["well", "well"]
    first, second = map(json.loads, seen.read_text().splitlines())
    assert first[0] == 70 and 140 < second[0] <= 170
    assert first[1] == second[1] and (first[2], second[2]) == ([], ["program"])


def test_a_card_is_checked_on_what_is_timed_first_and_then_on_every_op():
    work = accelerator._work("gpu", smoke=False)
    names = [(op.name, case.name) for op, case in work]
    assert names[: len(GOALS)] == list(GOALS) and len(set(names)) == len(names)
    ops = {name for name, _ in names}
    soon = work[: len(GOALS) + 2 * len(ops)]
    for shipped in (False, True):
        assert {op.name for op, case in soon if case.shipped == shipped} == ops
    assert all(not case.shipped for _, case in accelerator._work("gpu", smoke=True))


@pytest.mark.slow
def test_it_runs_from_end_to_end(tmp_path):
    first = {s["stage"]: s["ended"] for s in run(1, tmp_path, smoke=True, device="cpu")}
    log = (tmp_path / "part-1.log").read_text()
    assert first == {"correctness": "well", "kernels": "well", "tiles": "well"}, log
    found = json.loads((tmp_path / "correctness.json").read_text())
    assert found["right"] >= 8 and found["not"] == 0
    report = json.loads((tmp_path / "kernels.json").read_text())
    assert report["summary"]["wrong"] == [] and any("ms" in r for r in report["records"])
    assert json.loads((tmp_path / f"{report['device']}.json").read_text()), "what was tuned"

    second = {s["stage"]: s["ended"] for s in run(2, tmp_path, smoke=True, device="cpu")}
    for shape in ("tiny", "tiny-moe"):  # torch need not be there
        assert second[f"{shape}-jaxserve"] == "well", (tmp_path / "part-2.log").read_text()
        report = json.loads((tmp_path / f"{shape}-jaxserve.json").read_text())
        assert all(w["tokens_per_second"] > 0 for w in report["workloads"])
