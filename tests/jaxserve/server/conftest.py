"""One live server per module; each test gets it with a quiet, unscripted engine."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import openai
import pytest

from tests.jaxserve.server.fake_llm import FakeLLM
from tests.jaxserve.server.live_server import LiveServer, wait_until


@pytest.fixture(scope="module")
def module_server() -> Iterator[LiveServer]:
    with LiveServer(FakeLLM()) as server:
        yield server


@pytest.fixture
def live(module_server: LiveServer) -> Iterator[LiveServer]:
    llm = module_server.llm
    llm.script, llm.delay = (lambda prompt: None), 0.0
    llm.submitted.clear()
    llm.aborted.clear()
    yield module_server
    wait_until(lambda: llm.stats().num_running == 0)  # no test leaves a request behind
    assert llm.stats().num_free_pages == llm.stats().num_pages


@pytest.fixture
def client(live: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def http(live: LiveServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=live.url, timeout=10) as client:
        yield client
