"""Contestants alternate, stop while others work, and failures leave the rest standing."""

import argparse
import json
import sys

import pytest

from benchmarks import compare, contestants
from benchmarks.contestants import Contestant, Failed
from benchmarks.records import ROOT
from benchmarks.workloads import build

FAKE = """
import sys, time
sys.path.insert(0, {root!r})
from benchmarks.peers.protocol import Loaded, serve
def load(settings):
    print("a library's own words")  # must not reach the protocol
    if {peer!r} == "broken":
        raise RuntimeError("cannot load")
    def generate(prompts, lengths):
        if {peer!r} == "fickle" and len(prompts) > 1:
            raise ValueError("one at a time, please")
        with open({journal!r}, "a") as f:
            f.write({peer!r} + "\\n")
        short = {peer!r} == "short"
        return [[prompt[0]] * (n - short) for prompt, n in zip(prompts, lengths)]
    return Loaded(generate)
serve(load, [])
"""


@pytest.fixture
def journal(tmp_path, monkeypatch):
    """Fake peers instead of real ones; the file lists who generated, in order."""
    path = tmp_path / "journal"

    def command(peer):
        code = FAKE.format(root=str(ROOT), peer=peer, journal=str(path))
        return [sys.executable, "-c", code]

    monkeypatch.setattr(contestants, "_command", command)
    return path


def arguments(tmp_path, names, **more):
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 320}))
    settings = {"model": tmp_path, "contestants": names, "rounds": 2, "clock": "wall"}
    return argparse.Namespace(**settings, cores=[0], out=tmp_path / "out.jsonl", **more)


def test_contestants_alternate_and_every_sample_is_written(tmp_path, journal):
    comparison = compare.Comparison(arguments(tmp_path, ["a-f32", "b-bf16"]))
    comparison.run("batch16_decode")
    comparison.peak_memory()
    comparison.close()
    assert journal.read_text().split() == ["a", "b"] * 3  # a warm-up and two rounds
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [(line["name"], line["workload"]) for line in lines] == [
        ("a-f32", "batch16_decode"),
        ("b-bf16", "batch16_decode"),
        ("a-f32", "peak_rss"),
        ("b-bf16", "peak_rss"),
    ]
    first = lines[0]
    assert len(first["samples"]) == 2
    assert first["same_tokens"] == "16/16"
    assert {"median", "unit", "device", "versions", "commit", "load_average"} <= first.keys()


def test_a_failure_costs_one_contestant_one_workload(tmp_path, journal, capsys):
    names = ["broken-f32", "fickle-f32", "good-f32"]
    comparison = compare.Comparison(arguments(tmp_path, names))
    comparison.run("batch16_decode")
    comparison.run("single_decode")
    comparison.close()
    assert set(comparison.medians["batch16_decode"]) == {"good-f32"}
    assert set(comparison.medians["single_decode"]) == {"fickle-f32", "good-f32"}
    printed = capsys.readouterr().out
    assert "cannot load" in printed
    assert "one at a time, please" in printed


def test_outputs_of_the_wrong_length_are_refused(tmp_path, journal):
    contestant = Contestant("short-f32", tmp_path, [0])
    with pytest.raises(Failed, match=r"outputs of \[127\] tokens"):
        contestant.run(build("single_decode", 320))
    contestant.close()


def test_ratios_are_to_the_first_and_above_one_is_better():
    medians = {"single_decode": {"a": 10.0, "b": 25.0}, "ttft_32": {"a": 1.0, "b": 0.5}}
    rows = compare.table(medians, ["a", "b", "c"]).splitlines()
    assert rows[2] == "| single_decode | 10 (1.00x) | 25 (2.50x) | - |"
    assert rows[3] == "| ttft_32 | 1 (1.00x) | 0.5 (2.00x) | - |"
