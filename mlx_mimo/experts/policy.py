"""The usage tracker: which resident expert is worth least. NumPy only.

A policy keeps one number for each expert, resident or not: its **score**. The residents with the lowest scores leave
first. Whoever holds slots (`residents.py`) copies the scores of residents into an array `rank` in slot order, so that a
victim is an argmin; the pool, the tests and `replay` all run this code.

Experts are numbered by keys, 0 to num_keys - 1: (position of the layer in its pool) * num_experts + expert.
Time is counted in tokens; a call of one layer over T tokens moves it on by T / layers.
"""

from math import log

import numpy as np

DEFAULT_HALF_LIFE_TOKENS = 32.0
POLICIES = ("lfu", "lru")


class LFUPolicy:
    """Counts of uses that halve every `half_life_tokens`.

    Instead of decaying all counts, each use adds 2^(time / half life), which gives the same order: nothing needs to be
    touched as time passes. Of two experts used equally often the one used longer ago has decayed further, so recency
    breaks ties by itself. Counts of experts that left are kept: one that returns is worth what it was.

    A call counts once, however many tokens it has: half a use for being needed at all, half for the share of tokens.
    Counting each token of a chunk would drown what is decoded after it (figures in docs/RESIDENCY.md).
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
        """Experts `keys` (distinct) of one layer were used by `counts` of `tokens` tokens.

        True if all scores were scaled down, which changes no order but outdates copies.
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
        """Starts from known uses per token: the counts that such a past would have left."""
        self.score[:] = rates * (self.half_life_tokens / log(2) * 2.0**self._exponent)


class LRUPolicy:
    """The resident used longest ago leaves; within one call, the one fewest tokens used."""

    name = "lru"

    def __init__(self, num_keys: int, layers: int = 1):
        self.score = np.zeros(num_keys)
        self._clock = 1.0

    def touch(self, keys: np.ndarray, counts: np.ndarray, tokens: int) -> bool:
        self._clock += 1.0
        self.score[keys] = self._clock + counts / (tokens + 1.0)
        return False

    def seed(self, rates: np.ndarray) -> None:
        """Starts as if each expert had last been used before the first call, the rarest first."""
        self.score[:] = rates / (1.0 + rates.max(initial=0.0))


Policy = LFUPolicy | LRUPolicy


def make_policy(
    name: str, num_keys: int, layers: int = 1, half_life_tokens: float = DEFAULT_HALF_LIFE_TOKENS
) -> Policy:
    """One of POLICIES by name."""
    if name == "lfu":
        return LFUPolicy(num_keys, layers, half_life_tokens)
    if name == "lru":
        return LRUPolicy(num_keys, layers)
    raise ValueError(f"expert policy {name!r}; one of {', '.join(POLICIES)} expected")
