"""Methods under budgets: what a budget means to each, and replays that say what the engine said."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import search_ablations, search_chart, search_methods, search_tuning
from benchmarks.pool_search import ideal
from benchmarks.search import RIVALS, WHOLE, joined, judged
from benchmarks.search_methods import PATH, SETTINGS, Field, sized
from benchmarks.search_stats import Runs
from jaxserve.protocol import Node, Question
from reasoning.controllers import CONTROLLERS
from reasoning.controllers.best_of_n import BestOfN
from reasoning.pool import run_pool
from reasoning.result import Budget
from reasoning.tasks import ModChain, distinct

TASK = ModChain()


@dataclass(frozen=True)
class Student(Field):
    """A field of a perfect student of ModChain, which needs no engine."""

    def questions(self):
        for s, seed in enumerate(self.seeds):
            for p, (_, question, _) in enumerate(ideal(TASK.wrong, seed, len(self.problems))):
                yield p, s, question

    def search(self, controller, budget, **_):
        found = [[None] * len(self.seeds) for _ in self.problems]
        for s, seed in enumerate(self.seeds):
            for p, (pool, question, _) in enumerate(ideal(TASK.wrong, seed, len(self.problems))):
                found[p][s] = asyncio.run(run_pool(controller, pool(), question, budget, query=0))
        return found


def field(count: int = 6, seeds: tuple[int, ...] = (0, 1)) -> Student:
    return Student(None, TASK, tuple(distinct(TASK, "dev", 0, count)), seeds)


@pytest.mark.parametrize("name", WHOLE)
def test_a_method_of_whole_paths_is_the_same_on_sampled_ones(name):
    there = field()
    asked = {(p, s): question for p, s, question in there.questions()}
    assert all(isinstance(q, Question) for q in asked.values())
    found = there.search(BestOfN(paths=16), Budget())
    paths = [[search_methods._paths(result) for result in row] for row in found]
    settings = search_methods.settings_of(name)
    ran = search_methods.runs(there, name, (4, 16), settings)
    again = search_methods.replayed(there, paths, name, (4, 16), settings)
    assert np.array_equal(ran.right, again.right) and np.array_equal(ran.tokens, again.tokens)
    assert ran.tokens[0].max() <= 4 * PATH < ran.tokens[1].max()


def test_branches_of_sampled_paths_are_refused():
    (row,) = field(1, (0,)).search(BestOfN(paths=2), Budget())
    source = search_methods.Sampled(search_methods._paths(row[0]))
    text = source.whole(1)
    assert text.tokens == source.paths[1].tokens and len(text.confidences) == len(text.tokens)
    with pytest.raises(ValueError, match="whole paths alone"):
        source.branch(text, 3, Node(0))


def test_every_method_has_as_many_trials_and_what_was_chosen_is_one_of_them():
    counts = {name: len(trials) for name, trials in search_tuning.TRIALS.items()}
    assert len(set(counts.values())) == 1 and counts.keys() == set(RIVALS["hyper"][1:]) | {"hyper"}
    assert len({len(trials) for trials in search_tuning.SCORED.values()}) == 1
    trials = {**search_tuning.TRIALS, **search_tuning.SCORED}
    chosen = json.loads(SETTINGS.read_text())
    assert chosen.keys() == trials.keys()
    for name, settings in chosen.items():
        assert settings in trials[name]
    for name in search_tuning.TRIALS:
        for settings in trials[name]:
            CONTROLLERS[name](**{**sized(name, 8), **settings})


def test_the_best_trial_is_kept_and_other_methods_stay(tmp_path, monkeypatch):
    file = tmp_path / "settings.json"
    file.write_text(json.dumps({"esc": {"window": 9}}))
    monkeypatch.setattr(search_tuning, "SETTINGS", file)
    lines = [
        {"method": "hyper", "settings": {"safe": n}, "area": area}
        for n, area in ((0, 0.5), (2, 0.7), (3, 0.7))
    ]
    search_tuning.keep_best(lines)
    assert json.loads(file.read_text()) == {"esc": {"window": 9}, "hyper": {"safe": 2}}


def test_every_ablation_differs_from_the_whole_by_what_its_name_says():
    chosen = search_methods.settings_of("hyper")
    whole = CONTROLLERS["hyper"](**chosen)
    for name, change in search_ablations.ARMS.items():
        arm = CONTROLLERS["hyper"](**{**chosen, **change})
        assert (arm == whole) == (name == "whole"), name
    there = field(4, (0,))
    never = search_methods.runs(there, "hyper", (8,), chosen | {"novelty": 2.0, "width": 3})
    assert (
        never.tokens.max()
        <= 3 * PATH
        < search_methods.runs(there, "hyper", (8,), chosen | {"safe": 0}).tokens.max()
    )


def test_a_chart_has_a_panel_for_each_model(tmp_path):
    file = tmp_path / "lines.jsonl"
    lines = [
        {"part": "accuracy", "name": name, "model": model, "tokens": [10, 20], "accuracy": [0.1, y]}
        for model, y in (("one", 0.2), ("two", 0.3))
        for name in ("hyper", "pass@k")
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"part": "gain"}]))
    found = search_chart.curves([file])
    assert [len(part) for part in found.values()] == [2, 2] and list(found) == ["one", "two"]
    search_chart.chart(found, tmp_path / "a.svg")
    search_chart.chart(found, tmp_path / "b.svg")
    drawn = (tmp_path / "a.svg").read_text()
    assert drawn == (tmp_path / "b.svg").read_text() and "pass@k" in drawn


def test_shares_of_a_field_are_the_whole_again(tmp_path):
    whole = Field.of(None, ModChain(), "dev", 7, (3, 4))
    parts = [Field.of(None, ModChain(), "dev", 7, (3, 4), (i, 3)) for i in range(3)]
    assert sum((part.problems for part in parts), ()) == whole.problems
    assert [part.first for part in parts] == [0, 2, 4]
    rng, files = np.random.default_rng(0), list[Path]()
    runs = Runs(rng.integers(0, 2, (2, 7, 2)), rng.random((2, 7, 2)))
    for i, part in enumerate(parts):
        cut = slice(part.first, part.first + len(part.problems))
        files.append(tmp_path / f"{i}.npz")
        np.savez(files[-1], **{"a b right": runs.right[:, cut], "a b tokens": runs.tokens[:, cut]})
    (found,) = joined(files).values()
    assert np.array_equal(found.right, runs.right) and np.array_equal(found.tokens, runs.tokens)
    np.savez(files[0], other=np.zeros(1))
    with pytest.raises(SystemExit, match="different methods"):
        joined(files)


@pytest.mark.parametrize("cheap", [False, True])
def test_gains_are_told_at_tokens_that_both_have_spent(cheap: bool):
    """A method that ends before the first vote does is compared at no tokens of its own."""
    rng, told = np.random.default_rng(0), list[tuple[Any, ...]]()

    def runs(accuracy: list[float], tokens: list[float]) -> Runs:
        right = rng.random((2, 200, 1)) < np.array(accuracy)[:, None, None]
        spent = np.array(tokens)[:, None, None] * rng.uniform(0.9, 1.1, (2, 200, 1))
        return Runs(right, spent)

    methods = {
        "hyper": runs([0.9, 0.95], [100, 150] if cheap else [600, 900]),
        "self-consistency": runs([0.5, 0.6], [16 * PATH, 64 * PATH]),
    }
    found = judged(methods, (16, 64), lambda *about, **line: told.append((*about, line)))
    gains = [line for _, name, line in told if name == "where it spends as much"]
    least = found.get("hyper_least_gain_points_where_it_spends_as_much")
    if cheap:
        assert gains == [] and least is None
        return
    assert [round(line["tokens"], -2) for line in gains] == [600, 900]
    low, high = found["hyper_least_gain_points_where_it_spends_as_much_interval"]
    assert low < least < high and 30 < least < 50
