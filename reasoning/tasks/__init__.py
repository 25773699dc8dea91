"""Tasks with known answers: what shipped models are trained on and searches are measured by.

Each is a frozen dataclass that draws problems from seeds, solves them by example and grades
solutions exactly. Nothing is evaluated: steps are parsed word by word.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from reasoning.tasks.countdown import Countdown
from reasoning.tasks.modchain import ModChain
from reasoning.tasks.path import Path
from reasoning.tasks.recall import Recall
from reasoning.tasks.task import (
    STEP,
    Grade,
    Problem,
    Split,
    Task,
    distinct,
    draw,
    problems,
    split_of,
)

TASKS: dict[str, type] = {
    "modchain": ModChain,
    "countdown": Countdown,
    "path": Path,
    "recall": Recall,
}
"""By the name that a training config uses; its other settings are the class's fields."""


def make_task(name: str, settings: Mapping[str, Any]) -> Task:
    """The task of that name; `settings` may hold lists where its fields are tuples.

    Raises:
        ValueError: there is no such task, or it has no such setting or value.
    """
    if name not in TASKS:
        raise ValueError(f"task {name!r} is not known; there are {', '.join(TASKS)}")
    fields: dict[str, Any] = dict(settings)
    for key, value in settings.items():
        if isinstance(value, list):
            fields[key] = tuple(cast("list[Any]", value))
    try:
        return TASKS[name](**fields)
    except (TypeError, ValueError) as error:
        raise ValueError(f"settings of {name!r}: {error}") from None


__all__ = [
    "STEP",
    "TASKS",
    "Countdown",
    "Grade",
    "ModChain",
    "Path",
    "Problem",
    "Recall",
    "Split",
    "Task",
    "distinct",
    "draw",
    "make_task",
    "problems",
    "split_of",
]
