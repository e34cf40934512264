"""Figures for Prometheus."""

import time
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from .worker import Worker

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """Counts what requests do; everything else is asked for when somebody looks."""

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

    def text(self) -> bytes:
        return generate_latest(self.registry)

    def timed(self, responses: Iterable, began: float) -> Iterable:
        """Passes an answer's tokens through and takes their times."""
        previous = None
        for response in responses:
            now = time.perf_counter()
            if previous is None:
                self.first_token.observe(now - began)
            else:
                self.token.observe(now - previous)
            previous = now
            self.tokens.inc()
            yield response


class _Present(Collector):
    """What the worker, its caches and residency show at this moment."""

    def __init__(self, worker: Worker):
        self.worker = worker

    def collect(self) -> Iterable[Metric]:
        worker = self.worker
        queued = worker.queued
        running = max(0, worker.outstanding - queued)  # two looks: one may have ended in between
        yield GaugeMetricFamily("mlx_mimo_queue", "Requests that wait", value=queued)
        yield GaugeMetricFamily("mlx_mimo_running", "Requests that run", value=running)
        cache = getattr(worker, "prompt_cache", None)
        if cache is not None:
            kv_bytes = cache.nbytes + worker.running_kv_bytes
            yield GaugeMetricFamily("mlx_mimo_kv_bytes", "Bytes of KV caches, running and kept", value=kv_bytes)
            yield GaugeMetricFamily("mlx_mimo_kv_entries", "KV caches kept between requests", value=len(cache))
        residency = worker.model_provider.residency
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
