"""The policies: which resident expert is evicted first. NumPy only.

A policy keeps one number for each expert, resident or not: its **score**. The residents of lowest score are evicted
first. `residents.Residents` copies the scores of residents into an array `rank` in slot order, so that a victim is an
argmin. The pool and `replay` both run this code.

Experts are numbered by keys, 0 to num_keys - 1: (position of the layer in its pool) * num_experts + expert.
Time is counted in tokens; a call of one layer over T tokens moves it on by T / layers.
"""

from math import log
from typing import Protocol

import numpy as np

DEFAULT_HALF_LIFE_TOKENS = 32.0
POLICIES = ("lfu", "lru")


class LFUPolicy:
    """Counts of uses that halve every `half_life_tokens`.

    Instead of decaying all counts, each use adds 2^(time / half life), which gives the same order without any work as
    time passes. Of two experts used equally often, the one used longer ago has decayed further, so recency breaks ties.
    Counts of evicted experts are kept.

    A call counts as one use at most, however many tokens it has: half a use for being needed, and half in proportion to
    the share of its tokens. If each token of a chunk counted, the chunk would outweigh what is decoded after it: see
    docs/RESIDENCY.md.
    """

    name = "lfu"
    _MAX_EXPONENT = 500.0

    def __init__(self, num_keys: int, layers: int = 1, half_life_tokens: float = DEFAULT_HALF_LIFE_TOKENS):
        if not half_life_tokens > 0:
            raise ValueError(f"half life of {half_life_tokens} tokens, more than 0 expected")
        self.score = np.zeros(num_keys)
        self.half_life_tokens = half_life_tokens
        self._step = 1.0 / (layers * half_life_tokens)
        self._exponent = 0.0  # time in half lives since the scores were last scaled

    def touch(self, keys: np.ndarray, counts: np.ndarray, tokens: int) -> bool:
        """Counts a call of one layer: `counts` of its `tokens` tokens used the experts `keys`, which are distinct.

        Returns True if all scores were scaled down: the order is the same, but copies of scores are outdated.
        """
        self._exponent += tokens * self._step
        scaled = self._exponent > self._MAX_EXPONENT
        if scaled:
            self.score *= 2.0**-self._exponent
            self._exponent = 0.0
        uses = 1.0 if tokens == 1 else 0.5 + 0.5 * counts / tokens
        self.score[keys] += uses * 2.0**self._exponent
        return scaled

    def seed(self, rates: np.ndarray) -> None:
        """Sets the scores that a long past with `rates` uses per token would have left."""
        self.score[:] = rates * (self.half_life_tokens / log(2) * 2.0**self._exponent)


class LRUPolicy:
    """Evicts the resident used longest ago; of those used in one call, the one that fewest tokens used."""

    name = "lru"

    def __init__(self, num_keys: int, layers: int = 1):
        self.score = np.zeros(num_keys)
        self._clock = 1.0

    def touch(self, keys: np.ndarray, counts: np.ndarray, tokens: int) -> bool:
        """Counts a call, as LFUPolicy.touch; returns False."""
        self._clock += 1.0
        self.score[keys] = self._clock + counts / (tokens + 1.0)
        return False

    def seed(self, rates: np.ndarray) -> None:
        """Starts as if every expert had been used before the first call, the rarest longest ago."""
        self.score[:] = rates / (1.0 + rates.max(initial=0.0))


class Policy(Protocol):
    """What `Residents` asks of a policy; see LFUPolicy for the methods."""

    score: np.ndarray

    def touch(self, keys: np.ndarray, counts: np.ndarray, tokens: int) -> bool: ...

    def seed(self, rates: np.ndarray) -> None: ...


def make_policy(
    name: str, num_keys: int, layers: int = 1, half_life_tokens: float = DEFAULT_HALF_LIFE_TOKENS
) -> LFUPolicy | LRUPolicy:
    """The policy of that name; raises ValueError for a name that is not in POLICIES."""
    if name == "lfu":
        return LFUPolicy(num_keys, layers, half_life_tokens)
    if name == "lru":
        return LRUPolicy(num_keys, layers)
    raise ValueError(f"expert policy {name!r}; one of {', '.join(POLICIES)} expected")
