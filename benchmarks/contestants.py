"""One contestant: a driver in a process of its own, which only runs while it is asked something."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from benchmarks.records import ROOT
from benchmarks.workloads import MAX_LEN, Workload

PEERS = ("jaxserve", "transformers", "vllm", "openvino", "llamacpp")
DTYPES = {"f32": "float32", "bf16": "bfloat16", "f16": "float16", "int8": "int8"}


class Failed(Exception):
    """A contestant answered with an error, or ended."""


class Contestant:
    """A peer at a dtype, such as `vllm-bf16`, with a model loaded.

    Between questions the whole process group is stopped, so that no idle thread of one contestant
    takes time from another.

    Args:
        cache: folder for whatever the contestant compiles and keeps between starts.
        root: folder whose driver it is.
    """

    def __init__(
        self,
        name: str,
        model: Path,
        cores: list[int],
        cache: Path | None = None,
        *,
        root: Path = ROOT,
    ):
        self.name = name
        peer, _, dtype = name.partition("-")
        self._log = tempfile.NamedTemporaryFile("w+", prefix=f"{name}-", suffix=".log")  # noqa: SIM115
        with _pinned(cores):
            self._process = subprocess.Popen(
                _command(peer),
                cwd=root,
                env=os.environ | _environment(len(cores), cache),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                text=True,
                start_new_session=True,
            )
        settings = {
            "model": str(model),
            "dtype": DTYPES[dtype],
            "threads": len(cores),
            "max_len": MAX_LEN,
        }
        try:
            self.versions = self._ask({"op": "load", "settings": settings})["versions"]
        except Failed:
            self.close()
            raise

    def run(self, workload: Workload) -> dict[str, Any]:
        """Wall and CPU seconds, peak memory and the outputs, whose lengths are checked."""
        question = {"op": "run", "prompts": workload.prompts, "lengths": workload.lengths}
        answer = self._ask(question)
        lengths = [len(ids) for ids in answer["outputs"]]
        if lengths != workload.lengths:
            raise Failed(f"{self.name} on {workload.name}: outputs of {lengths} tokens")
        return answer

    def settle(self) -> float:
        """Lets it finish what it prepares behind its first answers; the seconds that took."""
        return self._ask({"op": "settle"})["wall_s"]

    def close(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)  # it may be stopped: nothing gentler works
        self._process.wait()
        with suppress(BrokenPipeError):  # what a driver that ended was still to be told
            self._process.stdin.close()
        self._process.stdout.close()
        self._log.close()

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        self._signal(signal.SIGCONT)
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise Failed(f"{self.name} ended: {self._last_words()}")
        self._signal(signal.SIGSTOP)
        answer = json.loads(line)
        if "error" in answer:
            raise Failed(f"{self.name}: {answer['error']}")
        return answer

    def _signal(self, number: int) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, number)

    def _last_words(self) -> str:
        return Path(self._log.name).read_text()[-2000:]


@contextmanager
def _pinned(cores: list[int]) -> Iterator[None]:
    """This thread, and what it starts, on these cores: a hook after fork would not suit threads."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _command(peer: str) -> list[str]:
    own = ROOT / ".peers" / peer / "bin" / "python"
    python = str(own) if own.exists() else sys.executable
    return [python, "-m", f"benchmarks.peers.{peer}"]


def _environment(threads: int, cache: Path | None) -> dict[str, str]:
    counts = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "TBB_NUM_THREADS"), str(threads))
    kept = ("XDG_CACHE_HOME", "JAXSERVE_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")
    return counts | {name: str(cache / name) for name in kept if cache}
