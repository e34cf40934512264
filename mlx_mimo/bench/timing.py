"""One timed run: a prompt at some depth of context, then given tokens, so that every run computes the same.

The tokens after the prompt are the next ones of the text instead of the model's choice: another program or another
expert memory is then timed on the same work, and a model of random weights does not repeat itself.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import NamedTuple

import mlx.core as mx

from ..runtime.loaded import loaded_of
from ..runtime.sampling import Sampler
from ..runtime.steps import prefill, steps


@dataclass(frozen=True)
class Case:
    """What is timed: a prompt and the tokens after it, with `depth` tokens in the caches before the clock starts."""

    prompt_tokens: int
    depth: int
    generation_tokens: int

    @property
    def tokens(self) -> int:
        """Tokens of one run, the context included."""
        return self.depth + self.prompt_tokens + self.generation_tokens

    def cut(self, tokens: Sequence[int]) -> tuple[list[int], list[int], list[int]]:
        """The first `self.tokens` of `tokens` as (context, prompt, generated). Raises ValueError where there are too
        few."""
        if len(tokens) < self.tokens:
            raise ValueError(f"{len(tokens)} tokens, {self.tokens} needed")
        start, end = self.depth, self.depth + self.prompt_tokens
        return list(tokens[:start]), list(tokens[start:end]), list(tokens[end : self.tokens])


@dataclass(frozen=True)
class Sample:
    """The times and residency counts of one run. Prefill ends with the first token. `read_s` is the time in which at
    least one read was running, `wait_s` the part of it in which the model waited."""

    prefill_s: float
    decode_s: float
    prefill_hits: int = 0
    prefill_misses: int = 0
    prefill_bytes: int = 0
    prefill_read_s: float = 0.0
    prefill_wait_s: float = 0.0
    decode_hits: int = 0
    decode_misses: int = 0
    decode_bytes: int = 0
    decode_read_s: float = 0.0
    decode_wait_s: float = 0.0


class Counts(NamedTuple):
    """The residency counts up to a moment, or between two; the order is that of Sample's fields."""

    hits: int
    misses: int
    bytes: int
    read_s: float
    wait_s: float

    def since(self, before: "Counts") -> "Counts":
        return Counts(
            self.hits - before.hits,
            self.misses - before.misses,
            self.bytes - before.bytes,
            self.read_s - before.read_s,
            self.wait_s - before.wait_s,
        )


@dataclass(frozen=True)
class Spread:
    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(median(values), min(values), max(values))


def forced_sampler(tokens: Sequence[int]) -> Sampler:
    """A sampler that returns `tokens` one after another and ignores the model's logprobs."""
    following = iter([*tokens, tokens[-1], tokens[-1]])  # a loop that runs ahead samples more than it hands out
    return lambda logprobs: mx.array([next(following)])


class Waiting:
    """Context manager: `seconds` is how long the model's thread has read itself or waited for other threads' reads."""

    def __init__(self, reader):
        self.reader = reader
        self.seconds = 0.0

    def __enter__(self) -> "Waiting":
        if self.reader is not None:
            self.reader.submit = self._submit
        return self

    def __exit__(self, *_) -> None:
        if self.reader is not None:
            del self.reader.submit

    def _submit(self, requests, background: bool = False):
        batch = self._timed(type(self.reader).submit)(self.reader, requests, background)
        batch.wait = self._timed(batch.wait)
        return batch

    def _timed(self, function):
        def timed(*arguments):
            began = time.perf_counter()
            try:
                return function(*arguments)
            finally:
                self.seconds += time.perf_counter() - began

        return timed


def run_case(model, case: Case, tokens: Sequence[int]) -> Sample:
    """Runs a case once, on the first `case.tokens` of `tokens`, and returns its times and counts."""
    past, prompt, following = case.cut(tokens)
    cache = model.make_cache()
    if past:
        prefill(model, mx.array([*past, 0]), cache, loaded_of(model).prefill_chunk, lambda *_: None)
    residency = loaded_of(model).residency
    with Waiting(residency.reader if residency else None) as waiting:
        counters = [_counters(residency, waiting)]
        began = time.perf_counter()
        answer = steps(
            model, mx.array(prompt), cache, max_tokens=case.generation_tokens, sampler=forced_sampler(following)
        )
        first = 0.0
        for _ in answer:
            if not first:
                first = time.perf_counter()
                counters.append(_counters(residency, waiting))
        end = time.perf_counter()
        counters.append(_counters(residency, waiting))
    in_prefill, in_decode = (after.since(before) for before, after in pairwise(counters))
    return Sample(first - began, end - first, *in_prefill, *in_decode)


def _counters(residency, waiting: Waiting) -> Counts:
    if residency is None:
        return Counts(0, 0, 0, 0.0, 0.0)
    found = residency.counters
    return Counts(found.hits, found.misses, found.bytes_read, found.read_seconds, waiting.seconds)
