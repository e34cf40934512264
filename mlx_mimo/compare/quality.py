"""How far two models' predictions are apart on a text: KL divergence, agreement, perplexity."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import exp

import mlx.core as mx
import numpy as np

ROWS = 64  # compared at once: 64 × 152,576 float64 are 78 MB


@dataclass(frozen=True)
class Comparison:
    """Figures over all predicted tokens. Divergences of B from A are in nats: Σ p_A (log p_A - log p_B)."""

    tokens: int
    kl_mean: float
    kl_99: float
    kl_max: float
    top1_agreement: float
    perplexity_a: float
    perplexity_b: float


def windows(ids: Sequence[int], length: int, most: int) -> list[list[int]]:
    """Cuts the first `most` of `ids` into pieces of `length` tokens; a last piece of one token is left out."""
    ids = list(ids[:most])
    pieces = [ids[start : start + length] for start in range(0, len(ids), length)]
    return [piece for piece in pieces if len(piece) > 1]


def predictions(model, pieces: Sequence[Sequence[int]], each: Callable[[np.ndarray], None]) -> None:
    """Runs each piece from an empty cache and calls `each` with the float32 log-probabilities (len(piece) - 1, vocab)
    of its tokens after the first."""
    for piece in pieces:
        logits = model(mx.array([piece[:-1]]), cache=model.make_cache())[0].astype(mx.float32)
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        mx.eval(logprobs)
        each(np.array(logprobs))
        del logits, logprobs
        mx.clear_cache()


class Comparer:
    """Adds up the comparison of two models, whose log-probabilities it is given block by block, in the same order."""

    def __init__(self) -> None:
        self._kl: list[np.ndarray] = []
        self._agree = 0
        self._lost = [0.0, 0.0]

    def add(self, a: np.ndarray, b: np.ndarray, following: Sequence[int]) -> None:
        """Adds rows of log-probabilities a and b (rows, vocab); `following` (rows,) are the text's tokens."""
        for start in range(0, len(a), ROWS):
            p, q = (x[start : start + ROWS].astype(np.float64) for x in (a, b))
            targets = np.asarray(following[start : start + ROWS])
            rows = np.arange(len(targets))
            weight = np.exp(p)
            # A token that A gives no probability adds nothing, whatever B gives it.
            gap = np.subtract(p, q, out=np.zeros_like(p), where=weight > 0)
            self._kl.append((weight * gap).sum(axis=1))
            self._agree += int((p.argmax(axis=1) == q.argmax(axis=1)).sum())
            for which, x in enumerate((p, q)):
                self._lost[which] -= float(x[rows, targets].sum())

    def result(self) -> Comparison:
        """The figures over all rows added so far; at least one row must have been."""
        kl = np.concatenate(self._kl)
        return Comparison(
            kl.size,
            float(kl.mean()),
            float(np.quantile(kl, 0.99)),
            float(kl.max()),
            self._agree / kl.size,
            exp(self._lost[0] / kl.size),
            exp(self._lost[1] / kl.size),
        )
