"""Load on a running server: `python -m benchmarks.online --url http://127.0.0.1:8000 --model M`.

Streams /v1/completions at a request rate (Poisson arrivals, seeded) or at a fixed concurrency, and
reports throughput with percentiles of the time to the first token (TTFT), the time per output
token after it (TPOT) and the gaps between chunks (ITL). Any OpenAI-compatible server will do; the
prompts are token ids.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np

from benchmarks import workloads
from benchmarks.records import record, write


@dataclass
class Timing:
    """Clock readings of one streamed request."""

    sent: float
    chunks: list[float] = field(default_factory=list)  # arrival of each piece of text
    tokens: int = 0  # as the server counts them
    error: str | None = None

    @property
    def ttft(self) -> float:
        return self.chunks[0] - self.sent

    @property
    def tpot(self) -> float:
        return (self.chunks[-1] - self.chunks[0]) / max(self.tokens - 1, 1)

    @property
    def gaps(self) -> list[float]:
        return [b - a for a, b in zip(self.chunks, self.chunks[1:], strict=False)]


async def events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """The JSON of every server-sent event until `[DONE]`."""
    async for line in response.aiter_lines():
        if line == "data: [DONE]":
            return
        if line.startswith("data: "):
            yield json.loads(line.removeprefix("data: "))


async def ask(client: httpx.AsyncClient, model: str, prompt: list[int], length: int) -> Timing:
    """Streams one request to its end; an HTTP error is a result, not an exception."""
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": length,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    timing = Timing(time.perf_counter())
    try:
        async with client.stream("POST", "/v1/completions", json=body) as response:
            response.raise_for_status()
            async for event in events(response):
                if "error" in event:
                    raise httpx.HTTPError(str(event["error"]))
                if event.get("choices"):
                    timing.chunks.append(time.perf_counter())
                if event.get("usage"):
                    timing.tokens = event["usage"]["completion_tokens"]
    except httpx.HTTPError as error:
        timing.error = f"{type(error).__name__}: {error}"
    return timing


async def load(
    client: httpx.AsyncClient,
    model: str,
    requests: Sequence[tuple[list[int], int]],
    *,
    rate: float | None = None,
    concurrency: int | None = None,
    seed: int = 0,
) -> list[Timing]:
    """Sends everything: by `rate` requests a second, at most `concurrency` at once, or at once."""
    waits = np.random.default_rng(seed).exponential(1 / rate if rate else 0.0, len(requests))
    room = asyncio.Semaphore(concurrency or len(requests))

    async def one(delay: float, prompt: list[int], length: int) -> Timing:
        await asyncio.sleep(delay)
        async with room:
            return await ask(client, model, prompt, length)

    arrivals = zip(np.cumsum(waits).tolist(), requests, strict=True)
    return await asyncio.gather(*(one(at, *request) for at, request in arrivals))


def summary(timings: Sequence[Timing], seconds: float) -> dict[str, Any]:
    """Throughput, percentiles in milliseconds, and what went wrong."""
    good = [t for t in timings if t.error is None and t.chunks]
    return {
        "requests": len(timings),
        "failed": len(timings) - len(good),
        "errors": sorted({t.error for t in timings if t.error})[:3],
        "requests_per_s": round(len(good) / seconds, 3),
        "ttft_ms": percentiles([t.ttft for t in good]),
        "tpot_ms": percentiles([t.tpot for t in good if t.tokens > 1]),
        "itl_ms": percentiles([gap for t in good for gap in t.gaps]),
    }


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    if not seconds:
        return {}
    return {f"p{q}": round(float(np.percentile(seconds, q)) * 1e3, 2) for q in (50, 90, 99)}


def requests(name: str, vocab_size: int, count: int) -> list[tuple[list[int], int]]:
    """As many requests of a workload as asked for, from as many rounds as that takes."""
    out: list[tuple[list[int], int]] = []
    while len(out) < count:
        workload = workloads.build(name, vocab_size, round=len(out))
        out += zip(workload.prompts, workload.lengths, strict=True)
    return out[:count]


async def run(args: argparse.Namespace) -> dict[str, Any]:
    headers = {"Authorization": f"Bearer {args.api_key}"} if args.api_key else {}
    limits = httpx.Limits(max_connections=None)
    asked = requests(args.workload, args.vocab_size, args.requests)
    async with httpx.AsyncClient(
        base_url=args.url, headers=headers, timeout=None, limits=limits
    ) as client:
        begin = time.perf_counter()
        timings = await load(
            client, args.model, asked, rate=args.rate, concurrency=args.concurrency, seed=args.seed
        )
        seconds = time.perf_counter() - begin
    tokens = sum(t.tokens for t in timings) / seconds
    about = {"model": args.model, "rate": args.rate, "concurrency": args.concurrency}
    name = f"online {args.workload}"
    return record(args.name, name, [tokens], "tok/s", **about, **summary(timings, seconds))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", required=True, help="the name that the server gives it")
    parser.add_argument("--vocab-size", type=int, required=True)
    parser.add_argument("--name", default="jaxserve", help="of the contestant, in the record")
    parser.add_argument("--workload", default="mixed_64", choices=workloads.NAMES)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--rate", type=float, help="requests a second; default: all at once")
    parser.add_argument("--concurrency", type=int, help="most requests in flight")
    parser.add_argument("--api-key")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    write(asyncio.run(run(_arguments())))
