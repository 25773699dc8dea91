"""Compiles grammars from strangers in a process that may be lost.

llguidance bounds its own work, yet a chain of a few thousand rules overflows its stack, and some
intersections of patterns take minutes. A child process tries every new grammar first: if it dies or
runs out of time, so does that one request, and nothing else.

Run as a script this file is the child; it imports llguidance and the standard library only.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import queue
import resource
import signal
import subprocess
import sys
import weakref
from collections.abc import Sequence

import llguidance

_MEMORY = 2 << 30  # bytes of address space


class Rehearsal:
    """A few child processes, started when needed and replaced when lost.

    Args:
        cpu_seconds: processor time that a grammar may take to compile.
        children: most processes at once.
    """

    def __init__(self, cpu_seconds: float = 2.0, children: int = 4):
        self.cpu_seconds = cpu_seconds
        self._idle: queue.LifoQueue[subprocess.Popen[bytes] | None] = queue.LifoQueue()
        for _ in range(children):
            self._idle.put(None)
        weakref.finalize(self, _dismiss_all, self._idle)

    def survives(self, grammar: str, size: int = 0, names: Sequence[str] = ()) -> bool:
        """Whether compiling this grammar ends in time; whether it is correct is not asked.

        Args:
            size: of the vocabulary; tokens up to there may be meant by their id.
            names: of special tokens. A grammar with an unknown one fails before it has cost much.
        """
        child = self._idle.get()
        try:
            child = child or self._start()
            alive = _ask(child, json.dumps([grammar, size, list(names)]))
            if not alive:
                _dismiss(child)
                child = None
            return alive
        finally:
            self._idle.put(child)

    def _start(self) -> subprocess.Popen[bytes]:
        """A child, which leaves by itself when its input is closed."""
        return subprocess.Popen(
            # -P: our folder, full of common names, is no place to import from
            [sys.executable, "-P", __file__, str(self.cpu_seconds)],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )


def _dismiss(child: subprocess.Popen[bytes]) -> None:
    child.kill()
    with contextlib.suppress(BrokenPipeError), child:  # waits for it and closes its pipes
        pass


def _dismiss_all(idle: queue.LifoQueue[subprocess.Popen[bytes] | None]) -> None:
    while not idle.empty():
        if (child := idle.get()) is not None:
            _dismiss(child)


def _ask(child: subprocess.Popen[bytes], question: str) -> bool:
    """Whether the child answers before it dies."""
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        child.stdin.write(question.encode() + b"\n")
        child.stdin.flush()
    except BrokenPipeError:
        return False
    return bool(child.stdout.readline())


class _Bytes:
    """A vocabulary of single bytes and special tokens: what matters here depends on no others."""

    eos_token_id = 256
    bos_token_id = None

    def __init__(self, size: int, names: Sequence[str]):
        single = [bytes([b]) for b in range(256)]
        self.tokens = [*single, b"<eos>", *(name.encode() for name in names)]
        self.special_token_ids = range(256, len(self.tokens))
        self.tokens += [b""] * (size - len(self.tokens))

    def __call__(self, text: str | bytes) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


@functools.lru_cache(maxsize=4)
def _tokenizer(size: int, names: tuple[str, ...]) -> llguidance.LLTokenizer:
    return llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Bytes(size, names)))


def _child(cpu_seconds: float) -> None:
    """Answers each line with a line, unless the kernel ends it first."""
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)  # its default action ends the process
        grammar, size, names = json.loads(line)
        matcher = llguidance.LLMatcher(_tokenizer(size, tuple(names)), grammar, log_level=0)
        if not matcher.is_error():
            matcher.compute_bitmask()
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(b"done\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    _child(float(sys.argv[1]))
