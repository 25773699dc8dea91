"""The main job in one file: serve a model of ours, and solve a problem through an OpenAI client.

`make demo` runs it. The model was trained on a task with exact answers, so what it writes is
checked: it multiplies numbers modulo 23, two neighbours at a time, and was taught gaps in its
tables. It is asked held-out problems until one of its solutions is right.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from openai import OpenAI

from reasoning.tasks import Problem, Task, distinct, make_task

MODEL = Path(__file__).parent.parent / "models" / "modchain-moe"


@contextmanager
def serving(model: Path) -> Iterator[str]:
    """The address of `jaxserve serve`, while it runs on a free port.

    Raises:
        RuntimeError: it ended before it could be asked.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "jaxserve.cli", "serve", str(model), "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        while not _answers(f"{url}/health"):
            if process.poll() is not None:
                raise RuntimeError(f"`{' '.join(command)}` ended with {process.returncode}")
            time.sleep(0.05)
        yield url
    finally:
        process.terminate()
        process.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url) as answer:
            return answer.status == 200
    except (urllib.error.URLError, ConnectionError):
        return False


def solve(client: OpenAI, task: Task, problem: Problem) -> bool:
    """Streams one chat completion, and says whether it is right."""
    print(f"\n  {problem.prompt}", end="", flush=True)
    stream = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": problem.prompt}],
        temperature=0,
        stream=True,
    )
    text = ""
    for chunk in stream:
        piece = chunk.choices[0].delta.content or ""
        text += piece
        print(piece.replace("|", "|\n   "), end="", flush=True)
    grade = task.grade(problem, text)
    print(f"\r  {grade.answer}: {'right' if grade.correct else 'wrong'}")
    return grade.correct


def main() -> int:
    data = tomllib.loads((MODEL / "recipe.toml").read_text())["data"]
    task = make_task(data["task"], data["settings"])
    began = time.monotonic()
    print(f"== serve {MODEL.name}", flush=True)
    with serving(MODEL) as url:
        print(f"  ready on {url} after {time.monotonic() - began:.1f} s")
        print("== chat completions, streamed by the openai client")
        client = OpenAI(base_url=f"{url}/v1", api_key="none")
        solved = any(solve(client, task, p) for p in distinct(task, "test", 0, 16))
    print("== solved" if solved else "== none of 16 problems solved")
    return 0 if solved else 1


if __name__ == "__main__":
    sys.exit(main())
