"""A client that hangs up frees its request at the next step, whichever way it was waiting."""

import asyncio
import json
import socket
import threading
from contextlib import contextmanager
from urllib.parse import urlsplit

import httpx
import openai
import pytest

from tests.jaxserve.server.live_server import wait_until

LONG = {"model": "fake/model", "prompt": "x", "max_tokens": 4000, "ignore_eos": True}
CHAT = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 3000, "ignore_eos": True}


def running(live):
    return live.llm.stats().num_running


@contextmanager
def asking(live, path, body):
    """A request that is under way; leaving the block hangs up."""
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n"
    address = urlsplit(live.url)
    with socket.create_connection((address.hostname, address.port)) as connection:
        connection.sendall(head.encode() + data)
        yield connection


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", LONG),
        ("/v1/completions", LONG | {"prompt": ["x", "y"], "n": 2}),
        ("/v1/completions", LONG | {"stream": True}),
        ("/v1/chat/completions", CHAT | {"stream": True}),
        ("/v1/messages", {"messages": CHAT["messages"], "max_tokens": 3000}),
        ("/v1/responses", {"input": "x", "stream": True}),
        ("/v1/embeddings", {"input": "x" * 3000}),
        ("/v1/embeddings", {"input": ["x" * 3000, "y" * 3000], "pooling": "mean"}),
    ],
)
def test_hanging_up_aborts(live, path, body):
    live.llm.delay = 0.005
    live.llm.script = lambda prompt: "x" * 3000
    given = body.get("prompt", body.get("input"))
    requests = len(given) if isinstance(given, list) else 1
    with asking(live, path, body) as connection:
        wait_until(lambda: running(live) == requests)
        if body.get("stream"):
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
    wait_until(lambda: running(live) == 0, timeout=5)
    assert len(live.llm.aborted) == requests
    wait_until(lambda: live.state.gate.running == 0)


def test_the_openai_client_closes_a_stream(live):
    live.llm.delay = 0.005
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none") as client:
        stream = client.completions.create(
            model="fake/model",
            prompt="x",
            max_tokens=4000,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        next(iter(stream))
        stream.close()
        wait_until(lambda: running(live) == 0, timeout=5)
    assert len(live.llm.aborted) == 1


def test_a_cancelled_task_aborts(live):
    live.llm.delay = 0.005

    async def main():
        async with httpx.AsyncClient(base_url=live.url) as client:
            task = asyncio.ensure_future(client.post("/v1/completions", json=LONG))
            while running(live) == 0:
                await asyncio.sleep(0.01)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    asyncio.run(main())
    wait_until(lambda: running(live) == 0, timeout=5)
    assert len(live.llm.aborted) == 1


@pytest.mark.parametrize(
    ("path", "body"), [("/v1/completions", LONG), ("/v1/embeddings", {"input": "x" * 3000})]
)
def test_hanging_up_while_a_thread_submits_leaves_no_orphan(live, path, body):
    live.llm.delay = 0.005
    with held(live, lambda params: True) as (arrived, go):
        with asking(live, path, body):
            assert arrived.acquire(timeout=5)
        wait_until(lambda: live.state.gate.running == 0)
        go.set()
        wait_until(lambda: len(live.llm.submitted) == 1)
        wait_until(lambda: running(live) == 0, timeout=5)
    assert len(live.llm.aborted) == 1


def test_a_slow_grammar_delays_no_plain_request(live, http):
    with held(live, lambda params: params.structured_outputs) as (arrived, go):
        slow = [
            threading.Thread(
                target=httpx.post,
                args=(f"{live.url}/v1/completions",),
                kwargs={"json": {"prompt": "x", "guided_regex": "a"}, "timeout": 30},
            )
            for _ in range(8)
        ]
        for thread in slow:
            thread.start()
        assert arrived.acquire(timeout=5)
        wait_until(lambda: live.state.gate.running == len(slow))
        assert http.post("/v1/completions", json={"prompt": "x"}).status_code == 200
        assert [params.structured_outputs for _, params in live.llm.submitted] == [None]
        go.set()
        for thread in slow:
            thread.join()


@contextmanager
def held(live, which):
    """Makes `submit` wait for such parameters; yields what says it waits, and what lets it go."""
    real, arrived, go = live.llm.submit, threading.Semaphore(0), threading.Event()

    def submit(ids, params, **kwargs):
        if which(params):
            arrived.release()
            assert go.wait(10)
        return real(ids, params, **kwargs)

    live.llm.submit = submit
    try:
        yield arrived, go
    finally:
        go.set()
        del live.llm.submit
