"""Figures for Prometheus."""

import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ..cancellation import Cancellation
from ..engine.request import Chat, GenerationRequest
from ..engine.results import Generation, Result, Token
from ..engine.worker import Worker

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """Counts what requests do. Of the worker it asks the rest when `text` is called."""

    def __init__(self, worker: Worker):
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "mlx_mimo_requests", "Requests answered", ["endpoint", "status"], registry=self.registry
        )
        self.prompt_tokens = Counter("mlx_mimo_prompt_tokens", "Tokens of prompts", registry=self.registry)
        self.cached_tokens = Counter(
            "mlx_mimo_cached_tokens", "Tokens of prompts that were not computed again", registry=self.registry
        )
        self.tokens = Counter("mlx_mimo_generated_tokens", "Tokens generated", registry=self.registry)
        self.first_token = Histogram(
            "mlx_mimo_first_token_seconds",
            "From the request to its first token",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.token = Histogram(
            "mlx_mimo_token_seconds", "From one token to the next", buckets=_SECONDS, registry=self.registry
        )
        self.disconnects = Counter("mlx_mimo_disconnects", "Clients that left early", registry=self.registry)
        self.registry.register(_Present(worker))

    @property
    def generated_tokens(self) -> int:
        """Since the start."""
        return int(self.tokens._value.get())

    def text(self) -> bytes:
        return generate_latest(self.registry)

    def timed(self, results: Iterable[Result], began: float) -> Iterator[Result]:
        """Passes an answer's results through and takes the times of its tokens; `began` as time.perf_counter has it."""
        previous = None
        for result in results:
            if isinstance(result, Token):
                now = time.perf_counter()
                if previous is None:
                    self.first_token.observe(now - began)
                else:
                    self.token.observe(now - previous)
                previous = now
                self.tokens.inc()
            yield result


class MeasuredEngine:
    """The engine, with what it does counted."""

    def __init__(self, worker: Worker, metrics: Metrics):
        self._worker = worker
        self._metrics = metrics

    @property
    def is_healthy(self) -> bool:
        return self._worker.is_healthy

    def place(self) -> AbstractContextManager[None]:
        return self._worker.place()

    def count_tokens(self, prompt: Chat) -> int:
        return self._worker.count_tokens(prompt)

    @contextmanager
    def generate(self, request: GenerationRequest, cancellation: Cancellation) -> Iterator[Generation]:
        began = time.perf_counter()
        with self._worker.generate(request, cancellation) as generation:
            self._metrics.prompt_tokens.inc(generation.started.prompt_tokens)
            self._metrics.cached_tokens.inc(generation.started.cached_tokens)
            yield Generation(generation.started, self._metrics.timed(generation.results, began))


class _Present(Collector):
    """The state of the worker, its caches and the experts' residency."""

    def __init__(self, worker: Worker):
        self.worker = worker

    def collect(self) -> Iterable[Metric]:
        worker = self.worker
        queued = worker.queued
        running = max(0, worker.outstanding - queued)  # two looks: one may have ended in between
        yield GaugeMetricFamily("mlx_mimo_queue", "Requests that wait", value=queued)
        yield GaugeMetricFamily("mlx_mimo_running", "Requests that run", value=running)
        cache = worker.prompt_cache
        kv_bytes = cache.nbytes + worker.running_kv_bytes
        yield GaugeMetricFamily("mlx_mimo_kv_bytes", "Bytes of KV caches, running and kept", value=kv_bytes)
        yield GaugeMetricFamily("mlx_mimo_kv_entries", "KV caches kept between requests", value=len(cache))
        residency = None if worker.loaded is None else worker.loaded.residency
        if residency is None:
            return
        counters = residency.counters
        for name, what, value in (
            ("expert_hits", "Needed experts that were in a slot", counters.hits),
            ("expert_misses", "Needed experts that had to be read", counters.misses),
            ("expert_evictions", "Experts that left a slot", counters.evictions),
            ("expert_read_bytes", "Bytes of experts read", counters.bytes_read),
            ("expert_read_seconds", "Time during which experts were read", counters.read_seconds),
        ):
            yield CounterMetricFamily(f"mlx_mimo_{name}", what, value=value)
        yield GaugeMetricFamily("mlx_mimo_expert_slots", "Slots", value=counters.slots)
        yield GaugeMetricFamily("mlx_mimo_expert_slot_bytes", "Bytes of a slot", value=counters.slot_bytes)
