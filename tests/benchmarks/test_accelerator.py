"""The plan for an accelerator runs whole, tiny, on CPU; and a bad stage costs only itself."""

import json

import pytest

from benchmarks import accelerator
from benchmarks.accelerator import Stage, run, stages


def test_parts_fit_into_ten_minutes(tmp_path):
    for part in (1, 2):
        planned = stages(part, tmp_path, smoke=False, device="auto")
        assert sum(stage.seconds for stage in planned) <= 580.001
        assert len({stage.name for stage in planned}) == len(planned)


def test_a_stage_that_fails_or_hangs_does_not_end_the_part(tmp_path, monkeypatch):
    commands = {"bad": "raise SystemExit(3)", "slow": "import time; time.sleep(60)", "good": ""}
    for name, code in commands.items():
        (tmp_path / f"stage_{name}.py").write_text(code)
    monkeypatch.setattr(accelerator, "ROOT", tmp_path)
    planned = [Stage(name, f"stage_{name}", [], 5 if name == "slow" else 30) for name in commands]
    monkeypatch.setattr(accelerator, "stages", lambda *_, **__: planned)
    ended = run(1, tmp_path / "out")
    assert [stage["ended"] for stage in ended] == ["exit 3", "over 5 s", "well"]
    written = json.loads((tmp_path / "out" / "stages-1.json").read_text())
    assert written["stages"] == ended


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
