"""Tasks with known answers: what shipped models are trained on and searches are measured by.

Each is a frozen dataclass that draws problems from seeds, solves them by example and grades
solutions exactly. Nothing is evaluated: steps are parsed word by word.
"""

from __future__ import annotations

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
    "problems",
    "split_of",
]
