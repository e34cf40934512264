"""How far two models' predictions are apart on a text: KL divergence, agreement, perplexity."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import exp

import mlx.core as mx
import numpy as np

ROWS = 64  # compared at once: 64 × 152,576 float64 are 78 MB


@dataclass(frozen=True)
class Comparison:
    """Over all predicted tokens. Divergences in nats, of B from A: Σ p_A (log p_A - log p_B)."""

    tokens: int
    kl_mean: float
    kl_99: float
    kl_max: float
    top1_agreement: float
    perplexity_a: float
    perplexity_b: float


def windows(ids: Sequence[int], length: int, most: int) -> list[list[int]]:
    """Pieces of at most `length` tokens, each read from an empty cache; `most` tokens in all, no piece below two."""
    ids = list(ids[:most])
    pieces = [ids[start : start + length] for start in range(0, len(ids), length)]
    return [piece for piece in pieces if len(piece) > 1]


def predictions(model, pieces: Sequence[Sequence[int]], each: Callable[[np.ndarray], None]) -> None:
    """Calls `each` with the log-probabilities (len(piece) - 1, vocab), float32, of every piece's following tokens."""
    for piece in pieces:
        logits = model(mx.array([piece[:-1]]), cache=model.make_cache())[0].astype(mx.float32)
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        mx.eval(logprobs)
        each(np.array(logprobs))
        del logits, logprobs
        mx.clear_cache()


class Comparer:
    """Takes model A's log-probabilities and B's in the same order, a block of rows at a time."""

    def __init__(self) -> None:
        self._kl: list[np.ndarray] = []
        self._agree = 0
        self._lost = [0.0, 0.0]

    def add(self, a: np.ndarray, b: np.ndarray, following: Sequence[int]) -> None:
        """a, b (rows, vocab) log-probabilities; `following` (rows,) the tokens that came."""
        for start in range(0, len(a), ROWS):
            p, q = (x[start : start + ROWS].astype(np.float64) for x in (a, b))
            targets = np.asarray(following[start : start + ROWS])
            rows = np.arange(len(targets))
            weight = np.exp(p)
            # Where A gives a token no probability at all it adds nothing, whatever B says.
            gap = np.subtract(p, q, out=np.zeros_like(p), where=weight > 0)
            self._kl.append((weight * gap).sum(axis=1))
            self._agree += int((p.argmax(axis=1) == q.argmax(axis=1)).sum())
            for which, x in enumerate((p, q)):
                self._lost[which] -= float(x[rows, targets].sum())

    def result(self) -> Comparison:
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
