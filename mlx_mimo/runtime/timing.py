"""One timed run: a prompt at some depth of context, then tokens that are given, so that every run computes the same.

The tokens that follow are not the model's choice but the next ones of the same text: another program, or another
budget, is then timed on the very same work, and a random model does not fall into a loop.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median

import mlx.core as mx

from .stream import PREFILL_CHUNK, generate_step, prefill


@dataclass(frozen=True)
class Case:
    """`depth` tokens are in the caches before the clock starts."""

    prompt_tokens: int
    depth: int
    generation_tokens: int

    @property
    def tokens(self) -> int:
        return self.depth + self.prompt_tokens + self.generation_tokens


@dataclass(frozen=True)
class Sample:
    """Seconds, and what residency did, of one run. Prefill ends with the first token."""

    prefill_s: float
    decode_s: float
    prefill_hits: int = 0
    prefill_misses: int = 0
    prefill_bytes: int = 0
    prefill_read_s: float = 0.0
    decode_hits: int = 0
    decode_misses: int = 0
    decode_bytes: int = 0
    decode_read_s: float = 0.0


@dataclass(frozen=True)
class Spread:
    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(median(values), min(values), max(values))


def forced(tokens: Sequence[int]) -> Iterator:
    """A sampler that gives `tokens` one after another, whatever the model would say."""
    following = iter([*tokens, tokens[-1], tokens[-1]])  # mlx-lm asks one step ahead
    return lambda logprobs: mx.array([next(following)])


def run_case(model, case: Case, tokens: Sequence[int]) -> Sample:
    """Times a case on the first `case.tokens` of `tokens`."""
    past, prompt, following = split(case, tokens)
    cache = model.make_cache()
    if past:
        prefill(model, mx.array([*past, 0]), cache, PREFILL_CHUNK, lambda *_: None)
    counters = [_counters(model)]
    began = time.perf_counter()
    steps = generate_step(
        mx.array(prompt),
        model,
        max_tokens=case.generation_tokens,
        sampler=forced(following),
        prompt_cache=cache,
    )
    first = 0.0
    for _ in steps:
        if not first:
            first = time.perf_counter()
            counters.append(_counters(model))
    end = time.perf_counter()
    counters.append(_counters(model))
    (h0, m0, b0, s0), (h1, m1, b1, s1), (h2, m2, b2, s2) = counters
    return Sample(first - began, end - first, h1 - h0, m1 - m0, b1 - b0, s1 - s0, h2 - h1, m2 - m1, b2 - b1, s2 - s1)


def split(case: Case, tokens: Sequence[int]) -> tuple[list[int], list[int], list[int]]:
    """(what is in the caches before, the prompt, what follows)"""
    if len(tokens) < case.tokens:
        raise ValueError(f"{len(tokens)} tokens, {case.tokens} needed")
    start, end = case.depth, case.depth + case.prompt_tokens
    return list(tokens[:start]), list(tokens[start:end]), list(tokens[end : case.tokens])


def _counters(model) -> tuple[int, int, int, float]:
    residency = getattr(model, "residency", None)
    if residency is None:
        return 0, 0, 0, 0.0
    found = residency.counters
    return found.hits, found.misses, found.bytes_read, found.read_seconds
