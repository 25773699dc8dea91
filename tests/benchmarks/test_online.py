"""The load generator against a small server of known timing."""

import asyncio
import json

import pytest

httpx = pytest.importorskip("httpx")

from benchmarks import online  # noqa: E402


class Server:
    """Streams as many chunks as tokens asked for; counts how many requests it had at once."""

    def __init__(self, gap: float = 0.0, status: int = 200):
        self.gap, self.status = gap, status
        self.running = self.most = 0

    async def __call__(self, request):
        body = json.loads(request.content)
        return httpx.Response(self.status, stream=_Stream(self, body["max_tokens"]))


class _Stream(httpx.AsyncByteStream):
    def __init__(self, server, tokens):
        self.server, self.tokens = server, tokens

    async def __aiter__(self):
        self.server.running += 1
        self.server.most = max(self.server.most, self.server.running)
        for _ in range(self.tokens):
            await asyncio.sleep(self.server.gap)
            yield b'data: {"choices": [{"text": "x"}]}\n\n'
        usage = {"choices": [], "usage": {"completion_tokens": self.tokens}}
        self.server.running -= 1  # the client reads no further than the next line
        yield f"data: {json.dumps(usage)}\n\ndata: [DONE]\n\n".encode()


def load(server, requests, **settings):
    async def go():
        transport = httpx.MockTransport(server)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await online.load(client, "m", requests, **settings)

    return asyncio.run(go())


def test_timings_count_tokens_and_gaps():
    timings = load(Server(gap=0.01), [([1, 2], 5)] * 3)
    assert [t.tokens for t in timings] == [5, 5, 5]
    assert all(len(t.gaps) == 4 and t.ttft >= 0.01 and t.tpot >= 0.01 for t in timings)


def test_concurrency_is_a_ceiling():
    server = Server(gap=0.001)
    load(server, [([1], 3)] * 12, concurrency=4)
    assert server.most == 4


def test_arrivals_follow_the_rate():
    timings = load(Server(), [([1], 1)] * 20, rate=200.0)
    sent = [t.sent for t in timings]
    assert sent == sorted(sent)
    assert 0.02 < sent[-1] - sent[0] < 1.0


def test_failures_are_counted_not_raised():
    timings = load(Server(status=503), [([1], 1)] * 4)
    found = online.summary(timings, seconds=1.0)
    assert (found["failed"], found["ttft_ms"]) == (4, {})
    assert "503" in found["errors"][0]


def test_requests_repeat_a_workload_with_fresh_ids():
    asked = online.requests("mixed_64", 320, 70)
    assert len(asked) == 70
    assert len({tuple(prompt) for prompt, _ in asked}) == 70
