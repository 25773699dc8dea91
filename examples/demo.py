"""The main job in one file: a checkpoint, an LLM, a server, and a client that streams from it.

Run it with `make demo`. The model is tiny and its weights are random, so what it writes means
nothing; `python examples/demo.py Qwen/Qwen3-0.6B` serves a trained one, from a folder or the hub.
"""

from __future__ import annotations

import json
import socket
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn

from jaxserve import LLM, SamplingParams
from jaxserve.server.app import create_app
from jaxserve.testing import write_checkpoint


def generate(llm: LLM) -> None:
    prompts = ["The quick brown fox", "2 + 2 ="]
    for output in llm.generate(prompts, SamplingParams(temperature=0, max_tokens=16)):
        completion = output.outputs[0]
        print(f"  {output.prompt!r} -> {completion.text!r} ({completion.finish_reason})")


def stream(llm: LLM) -> None:
    started = time.monotonic()
    for delta in llm.stream("Where does the time go?", SamplingParams(seed=1, max_tokens=8)):
        print(f"  {1e3 * (time.monotonic() - started):6.1f} ms  {delta.text!r}")


@contextmanager
def serving(llm: LLM) -> Iterator[str]:
    """The server's address, while it runs beside us on a free port."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(create_app(llm), log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield "http://{}:{}".format(*listener.getsockname())
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


def chat(url: str) -> None:
    """One streamed chat completion, as any OpenAI client asks for it."""
    body = {
        "messages": [{"role": "user", "content": "Hello!"}],
        "max_tokens": 12,
        "seed": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    with urllib.request.urlopen(f"{url}/v1/models") as answer:
        body["model"] = json.load(answer)["data"][0]["id"]
    request = urllib.request.Request(
        f"{url}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as events:
        for line in events:
            data = line.decode().removeprefix("data:").strip()
            if not data or data == "[DONE]":
                continue
            chunk = json.loads(data)
            for choice in chunk["choices"]:
                if text := choice["delta"].get("content"):
                    print(f"  {text!r}")
            if usage := chunk.get("usage"):
                print(f"  {usage['prompt_tokens']} tokens in, {usage['completion_tokens']} out")


def main(model: str | None = None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = model or write_checkpoint(Path(folder) / "tiny-qwen3", "qwen3")
        print(f"== load {path}", flush=True)
        started = time.monotonic()
        with LLM(path) as llm:
            print(f"  ready after {time.monotonic() - started:.1f} s")
            print("== generate")
            generate(llm)
            print("== stream")
            stream(llm)
            with serving(llm) as url:
                print(f"== serve on {url}, and stream a chat completion from it")
                chat(url)
    print("== done")


if __name__ == "__main__":
    main(*sys.argv[1:2])
