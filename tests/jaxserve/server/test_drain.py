"""SIGTERM: newcomers get 503, those inside finish, and the process exits with 0."""

import json
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx

from tests.jaxserve.server.live_server import wait_until

ROOT = Path(__file__).parents[3]
SERVE = """
from tests.jaxserve.server.fake_llm import FakeLLM
from jaxserve.server.app import create_app
from jaxserve.server.run import bind, run

listener = bind("127.0.0.1", 0)
print(listener.getsockname()[1], flush=True)
run(create_app(FakeLLM(delay=0.01)), listener, drain_timeout={timeout})
print("closed", flush=True)
"""
SLOW = {"prompt": "x", "ignore_eos": True, "stream": True}


@contextmanager
def serving(timeout):
    """A server process, its client, and its end."""
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE.format(timeout=timeout)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    try:
        port = int(process.stdout.readline())
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as http:
            wait_until(lambda: _answers(http), timeout=20)
            yield process, http
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def _answers(http):
    try:
        return http.get("/health").status_code == 200
    except httpx.TransportError:
        return False


def test_running_requests_finish_and_new_ones_are_turned_away():
    with serving(timeout=30) as (process, http):
        got = []
        with http.stream("POST", "/v1/completions", json=SLOW | {"max_tokens": 150}) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            wait_until(lambda: http.get("/health").status_code == 503)
            turned_away = http.post("/v1/completions", json={"prompt": "x"})
            assert turned_away.status_code == 503
            assert turned_away.json()["error"]["code"] == "draining"
            assert "retry-after" in turned_away.headers
            got = [line for line in lines if line]
        assert got[-1] == "data: [DONE]"
        assert len(got) == 150
        assert process.wait(10) == 0
        assert process.stdout.read() == "closed\n"


def test_what_does_not_finish_in_time_is_told_so():
    with serving(timeout=0.3) as (process, http), ThreadPoolExecutor(2) as pool:
        slow = SLOW | {"max_tokens": 3000}
        plain = pool.submit(http.post, "/v1/completions", json=slow | {"stream": False})
        stream = pool.submit(http.post, "/v1/completions", json=slow)
        wait_until(lambda: http.get("/load").json()["server_load"] == 2)
        process.send_signal(signal.SIGTERM)
        assert plain.result(20).status_code == 503
        assert "cut off" in plain.result().json()["error"]["message"]
        assert stream.result(20).status_code == 200
        last = stream.result().text.strip().split("\n")[-1]
        assert "cut off" in json.loads(last.removeprefix("data: "))["error"]["message"]
        assert process.wait(15) == 0


def test_a_second_signal_stops_at_once():
    with serving(timeout=60) as (process, http):
        thread = threading.Thread(target=_ignore_failure, args=(http,))
        thread.start()
        wait_until(lambda: http.get("/load").json()["server_load"] == 1)
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: http.get("/health").status_code == 503)
        process.send_signal(signal.SIGTERM)
        assert process.wait(15) == 0
        thread.join()


def _ignore_failure(http):
    with suppress(httpx.TransportError):
        http.post("/v1/completions", json=SLOW | {"max_tokens": 3000, "stream": False})
