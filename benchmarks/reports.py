"""Reports that are written as they go, so that a run goes on behind a case that ended it.

A kernel that has never met its hardware may hang there, or leave a device that answers nobody any
more. Neither can be caught by the process that it happens to. So a report says which case is being
run, `supervised` ends a process that says nothing new, and the next one begins behind that case.
"""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kernels_pallas.op import Case, Op

NO_ANSWER = "no answer"
"""How the reason begins for a case that hung."""

_FATAL = re.compile(  # after which a process, or a card, does nothing for anybody
    rf"^{NO_ANSWER}|^exit |_ILLEGAL_|_MISALIGNED_|_LAUNCH_FAILED|_LAUNCH_TIMEOUT|_INVALID_PC"
    r"|_HARDWARE_STACK|_ERROR_ASSERT|illegal (memory|address|instruction)|misaligned address"
    r"|unspecified launch"
)

_START = 2  # times the patience: until a process has written first, it imports and finds its card


@dataclass
class Report:
    """One JSON file of records, each of an op's case.

    Attributes:
        path: of the file.
        head: what it begins with.
        more: what stands beside it, and changes.
        running: the op and case that may end the process; or what is compiled ahead.
        began: when the run did, in its first process: seconds since 1970.
        alone: an earlier process ended while it compiled ahead, so this one does not.
    """

    path: Path
    head: dict[str, Any] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)
    records: list[dict[str, Any]] = field(default_factory=list)
    running: dict[str, Any] | None = None
    began: float = field(default_factory=time.time)
    alone: bool = False

    @classmethod
    def resumed(cls, path: Path, reason: str) -> Report:
        """What an earlier process wrote, whose last case failed for that reason; or an empty one,
        without a reason."""
        report = cls(path)
        if reason and (found := read(path)):
            report.records, report.began = found["records"], found["began"]
            last = found.get("running") or {}
            if "case" in last:
                report.records.append(last | {"correct": False, "failed": reason})
            report.alone = "ahead" in last
        return report

    @property
    def seconds(self) -> float:
        """Since the run began, in whatever process."""
        return round(time.time() - self.began, 1)

    def left(self, work: Sequence[tuple[Op, Case]]) -> list[tuple[Op, Case]]:
        """What of the work has no record."""
        done = {(r["op"], r["case"]) for r in self.records}
        return [(op, case) for op, case in work if (op.name, case.name) not in done]

    def each(self, work: Sequence[tuple[Op, Case]]) -> Iterator[tuple[Op, Case]]:
        """What is left of the work, written down before it is given out."""
        for op, case in self.left(work):
            self.running = {"op": op.name, "case": case.name}
            self.write()
            yield op, case
        self.running = None

    def parts(
        self, work: Sequence[tuple[Op, Case]], size: int, ahead: Callable[[Any, Any], Any]
    ) -> Iterator[tuple[Op, Case]]:
        """As `each`, in parts: of each, `ahead` first compiles what it can.

        Args:
            ahead: takes a part, and what to call as it goes on, so that it is seen to.
        """
        left = self.left(work)
        for begin in range(0, len(left), size):
            part = left[begin : begin + size]
            if not self.alone:
                self.running = {"ahead": [f"{op.name} {case.name}" for op, case in part]}
                self.write()
                ahead(part, self.write)
            yield from self.each(part)

    def add(self, records: Sequence[dict[str, Any]], **more: Any) -> None:
        """Writes down what the running case has given.

        Raises:
            SystemExit: the device does not answer since, so that whatever follows would fail, too.
        """
        self.records += records
        self.running = None
        self.write(**more)
        if any("failed" in r for r in records) and (reason := _ill()):
            raise SystemExit(f"the device answers nobody since: {reason}")

    def write(self, **more: Any) -> dict[str, Any]:
        """The report, which is also in its file."""
        self.more |= more
        running = {"running": self.running} if self.running else {}
        times = {"began": self.began, "seconds": self.seconds}
        report = self.head | times | self.more | running | {"records": self.records}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(
            ".part"
        )  # whoever is ended while it writes leaves a whole file
        part.write_text(json.dumps(report, indent=1) + "\n")
        part.replace(self.path)
        return report


def read(path: Path) -> dict[str, Any]:
    """A report; nothing if there is none."""
    return json.loads(path.read_text()) if path.exists() else {}


def fatal(path: Path) -> set[tuple[str, str, str]]:
    """Ops, cases and bodies that hung, or ended a process or a card, when that report was made.

    Where it cannot be told which body it was, "" stands for all. Of a case's bodies only the first
    counts: a card that is lost fails whatever follows.
    """
    found = dict[tuple[str, str], str]()
    for r in read(path).get("records", []):
        if _FATAL.search(r.get("failed", "")) and r.get("kind", "body") == "body":
            found.setdefault((r["op"], r["case"]), r.get("body", r.get("contestant", "")))
    return {(op, case, body.split(" ")[0]) for (op, case), body in found.items()}


def _ill() -> str:
    """Why the device cannot add any more; "" if it can."""
    import jax
    import jax.numpy as jnp

    try:
        jax.block_until_ready(jnp.ones(8) + 1)
    except Exception as error:  # whatever it is, nothing else will run either
        return " ".join(str(error).split())[:200]
    return ""


def supervised(
    command: Sequence[str], path: Path, *, patience: float, seconds: float, **popen: Any
) -> str:
    """Runs a command that writes a report until it ends well, and says how it ended.

    A process that dies, or writes nothing for `patience` seconds, is followed by one that is told
    the reason (`--resume REASON`) and goes on behind the case in question. A process that dies
    before its first case is followed by none.
    """
    deadline, reason, seen, lost = time.monotonic() + seconds, "", None, 0
    while True:
        again = ["--resume", reason] if reason else []
        child = subprocess.Popen([*command, *again], **popen)
        reason = _watched(child, path, patience, deadline)
        if not reason:
            return f"well, behind {lost} that ended it" if lost else "well"
        if time.monotonic() >= deadline:
            return f"over {seconds:g} s"
        state = read(path)
        now = len(state.get("records", [])), state.get("running")
        if now == seen or now == (0, None):
            return reason
        seen, lost = now, lost + 1


def _watched(child: subprocess.Popen, path: Path, patience: float, deadline: float) -> str:
    """Waits for a process, and ends it where it hangs. Returns why it has not ended well."""
    began = time.time()
    while child.poll() is None:
        written = path.stat().st_mtime if path.exists() else 0.0
        quiet = time.time() - max(began, written)
        most = patience if written > began else _START * patience
        if quiet > most or time.monotonic() >= deadline:
            child.kill()
            child.wait()
            return f"{NO_ANSWER} for {most:g} s"
        time.sleep(0.2)
    return f"exit {child.returncode}" if child.returncode else ""
