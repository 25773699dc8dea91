"""What a run says of itself while it runs: a line per step in a file, and a bar."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import TracebackType

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from jaxserve.train.loss import Metrics

_EVERY = 20  # steps whose metrics are read together: reading waits for the device


class Journal:
    """`metrics.jsonl` in a run's folder, and its progress bar. A context manager.

    Args:
        first: the last step of the checkpoint that the run goes on from; what the file says of
            later ones is forgotten, since they are taken again.
        steps: of the whole run.
        shown: whether there is a bar.
    """

    def __init__(self, folder: Path, first: int, steps: int, *, shown: bool):
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / "metrics.jsonl").open("a+")
        self._rewind(first)
        self._steps = steps
        self._pending: list[tuple[int, Metrics, int]] = []
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.4f}  {task.fields[rate]:,.0f} tok/s"),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, disable=not shown)
        shown_first = {"completed": first, "loss": float("nan"), "rate": 0.0}
        self._task = self._bar.add_task("training", total=steps, **shown_first)
        self._began = time.perf_counter()

    def __enter__(self) -> Journal:
        self._bar.start()
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None):
        self._bar.stop()
        self._file.close()

    def add(self, step: int, metrics: Metrics, num_tokens: int) -> None:
        """Notes a step that has been launched; its numbers are read later."""
        self._pending.append((step, metrics, num_tokens))
        if step % _EVERY == 0 or step == self._steps:
            self.write()

    def write(self) -> None:
        """Waits for the steps that have been noted, and puts their numbers into the file.

        Before a checkpoint: what a resumed run does not do again must be in the file.
        """
        if not self._pending:
            return
        lines = [
            {"step": step, **_numbers(metrics), "tokens": num_tokens}
            for step, metrics, num_tokens in self._pending
        ]
        now = time.perf_counter()
        seconds = (now - self._began) / len(lines)
        for line in lines:
            self._file.write(json.dumps({**line, "seconds": round(seconds, 4)}) + "\n")
        self._file.flush()
        rate = sum(line["tokens"] for line in lines) / (now - self._began)
        loss = sum(line["loss"] for line in lines) / len(lines)
        self._bar.update(self._task, completed=self._pending[-1][0], loss=loss, rate=rate)
        self._pending, self._began = [], now

    def _rewind(self, step: int) -> None:
        self._file.seek(0)
        whole = [line for line in self._file.readlines() if line.endswith("\n")]
        self._file.seek(0)
        self._file.truncate()
        self._file.writelines(line for line in whole if json.loads(line)["step"] <= step)


def _numbers(metrics: Metrics) -> dict[str, float]:
    return {name: round(float(x), 6) for name, x in metrics._asdict().items()}
