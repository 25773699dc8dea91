"""Prometheus metrics of one app, named as vLLM names its own."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from jaxserve.request import CompletionOutput

_TTFT = (0.001, 0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.25, 0.5, 1, 2.5, 5, 10, 30, 80, 160)
_TPOT = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.025, 0.05, 0.075, 0.1, 0.2, 0.4, 0.8, 2, 5, 10)
_E2E = (0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 20, 40, 60, 120, 480, 960, 1920)
_TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144)

_GAUGES = {
    "num_requests_running": ("num_running", "Requests in the current batch."),
    "num_requests_waiting": ("num_waiting", "Requests in the queue."),
    "kv_cache_pages": ("num_pages", "Pages of the KV cache."),
    "kv_cache_free_pages": ("num_free_pages", "Free pages of the KV cache."),
    "compiled_programs": ("num_compiled_programs", "Programs compiled so far."),
}
_COUNTERS = {
    "prefix_cache_queries": ("prefix_cache_queries", "Prompt tokens looked up in the cache."),
    "prefix_cache_hits": ("prefix_cache_hits", "Prompt tokens found in the cache."),
    "shared_keys": ("shared_keys_total", "Keys of shared prefixes that were not read again."),
    "num_preemptions": ("num_preemptions", "Sequences that gave their pages up."),
    "compiles_after_warmup": ("compiles_after_warmup", "Programs compiled after warm-up."),
    "prompt_tokens": ("prompt_tokens_total", "Prompt tokens processed."),
    "generation_tokens": ("generation_tokens_total", "Tokens generated."),
}


class Metrics:
    """A registry of its own, so that two apps in one process do not mix."""

    content_type = "text/plain; version=0.0.4; charset=utf-8"

    def __init__(self, llm: Any, model_name: str):
        self.registry = CollectorRegistry()
        self._model = model_name
        self.ttft = self._histogram("time_to_first_token_seconds", "Until the first token.", _TTFT)
        self.tpot = self._histogram("inter_token_latency_seconds", "Between tokens.", _TPOT)
        self.e2e = self._histogram("e2e_request_latency_seconds", "Until the last token.", _E2E)
        self.prompt_len = self._histogram("request_prompt_tokens", "Prompt length.", _TOKENS)
        self.output_len = self._histogram("request_generation_tokens", "Output length.", _TOKENS)
        self._finished = Counter(
            "jaxserve:request_success",
            "Requests by how they ended.",
            ["model_name", "finished_reason"],
            registry=self.registry,
        )
        self.registry.register(_EngineCollector(llm, model_name))

    def clock(self, num_prompt_tokens: int, n: int) -> Clock:
        """Starts timing one generation of `n` choices."""
        self.prompt_len.observe(num_prompt_tokens)
        return Clock(self, n)

    def count(self, reason: str) -> None:
        """Counts a finished choice."""
        self._finished.labels(self._model, reason).inc()

    def render(self) -> bytes:
        """The exposition text."""
        return generate_latest(self.registry)

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        family = Histogram(
            f"jaxserve:{name}", text, ["model_name"], buckets=buckets, registry=self.registry
        )
        return family.labels(self._model)


class Clock:
    """Times one generation as its reader sees it."""

    def __init__(self, metrics: Metrics, n: int):
        self._metrics, self._unfinished = metrics, n
        self._start = time.monotonic()
        self._last: dict[int, float] = {}  # when each choice last gained a token
        self._tokens = 0

    def tick(self, delta: CompletionOutput) -> None:
        """Takes note of a delta."""
        now, count = time.monotonic(), len(delta.token_ids)
        if count:
            if not self._last:
                self._metrics.ttft.observe(now - self._start)
            elif delta.index in self._last:
                self._metrics.tpot.observe((now - self._last[delta.index]) / count)
            self._last[delta.index] = now
            self._tokens += count
        if delta.finish_reason is not None:
            self._finish(delta.finish_reason, now)

    def aborted(self, left: int) -> None:
        """Takes note of a client that went away before `left` choices had ended."""
        for _ in range(left):
            self._metrics.count("abort")

    def _finish(self, reason: str, now: float) -> None:
        self._metrics.count(reason)
        self._unfinished -= 1
        if not self._unfinished:
            self._metrics.e2e.observe(now - self._start)
            self._metrics.output_len.observe(self._tokens)


class _EngineCollector:
    """Reads the engine's own numbers when scraped."""

    def __init__(self, llm: Any, model_name: str):
        self._llm, self._model = llm, model_name

    def collect(self) -> Iterator[Metric]:
        stats = self._llm.stats()
        for name, (field, text) in _GAUGES.items():
            gauge = GaugeMetricFamily(f"jaxserve:{name}", text, labels=["model_name"])
            gauge.add_metric([self._model], getattr(stats, field))
            yield gauge
        for name, (field, text) in _COUNTERS.items():
            counter = CounterMetricFamily(f"jaxserve:{name}", text, labels=["model_name"])
            counter.add_metric([self._model], getattr(stats, field))
            yield counter
        usage = GaugeMetricFamily(
            "jaxserve:kv_cache_usage_perc", "Share of pages in use.", labels=["model_name"]
        )
        usage.add_metric([self._model], 1 - stats.num_free_pages / max(1, stats.num_pages))
        yield usage

    def describe(self) -> Iterator[Metric]:
        return iter(())
