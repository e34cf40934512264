"""Random models that differ where an implementation could be wrong, and functions that run them in MLX."""

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np
from support import checkpoints

from mlx_mimo.config.model_args import ModelArgs
from mlx_mimo.models.mimo_v2_flash import Model

GOLDEN = Path(__file__).parent / "golden"
TOLERANCE = 1e-4  # absolute, on logits of size 1 to 5
VOCAB = 64  # keeps the golden files small


@dataclass(frozen=True)
class Case:
    name: str
    seed: int
    overrides: dict
    length: int = 330

    @property
    def config(self) -> dict:
        return checkpoints.tiny_config(vocab_size=VOCAB, **self.overrides)

    @property
    def windows(self) -> tuple[int, int]:
        """Keys that a query sees in the two readings of `sliding_window_size`: its own counted within, or on top."""
        size = self.config["sliding_window_size"]
        return size, size + 1

    def weights(self) -> dict[str, np.ndarray]:
        return dict(_weights(self.name))

    def tokens(self) -> np.ndarray:
        """(1, length)"""
        return np.random.default_rng(1000 + self.seed).integers(0, VOCAB, (1, self.length))

    def golden(self, window: int | None = None) -> np.ndarray:
        """(1, length, vocab) logits of transformers; `window` is one of `windows`, the larger by default."""
        return _golden(self.name)[f"logits_{self.windows[1] if window is None else window}"]


CASES = {
    case.name: case
    for case in (
        Case("short_window", 1, {}),
        Case(
            "released_window",
            27,
            {
                "sliding_window": 128,
                "sliding_window_size": 128,
                "num_hidden_layers": 5,
                "hybrid_layer_pattern": [0, 1, 1, 0, 1],
                "moe_layer_freq": [0, 1, 1, 1, 1],
                "n_routed_experts": 12,
                "num_experts_per_tok": 4,
                "hidden_size": 64,
            },
        ),
        Case(
            "sliding_first",
            2,
            {
                "sliding_window": 33,
                "sliding_window_size": 33,
                "num_hidden_layers": 3,
                "hybrid_layer_pattern": [1, 0, 1],
                "moe_layer_freq": [1, 0, 1],
                "num_attention_heads": 8,
                "swa_num_attention_heads": 8,
                "attention_value_scale": 0.612,
                "routed_scaling_factor": 2.5,
                "num_experts_per_tok": 3,
                "layernorm_epsilon": 1e-3,
                "rope_theta": 10_000_000,
                "swa_rope_theta": 500,
            },
        ),
    )
}


@functools.cache
def _weights(name: str) -> dict[str, np.ndarray]:
    return checkpoints.random_weights(CASES[name].config, CASES[name].seed, mtp=False)


@functools.cache
def _golden(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{name}.npz") as file:
        arrays = dict(file)
    if str(arrays["weights"]) != fingerprint(_weights(name)):
        raise AssertionError(f"golden/{name}.npz was made from other weights; run make_golden.py")
    return arrays


def fingerprint(weights: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode() + np.ascontiguousarray(weights[name]).tobytes())
    return digest.hexdigest()


def mlx_model(config: dict, weights: dict[str, np.ndarray], window: int | None = None, model_class=Model) -> Model:
    """A float32 model; `window` is the number of keys seen."""
    overrides = {} if window is None else {"window_keys": window}
    model = model_class(ModelArgs.from_dict(config | overrides))
    arrays = model.sanitize({name: mx.array(value) for name, value in weights.items()})
    model.load_weights(list(arrays.items()))
    model.eval()
    return model


def run(model: Model, tokens: np.ndarray, chunks: list[int] | None = None, cache: list | None = None) -> np.ndarray:
    """(B, L) → logits (B, L, vocab), through a cache where `chunks` says how many tokens a call takes."""
    if chunks is None:
        return np.array(model(mx.array(tokens)))
    cache = model.make_cache() if cache is None else cache
    ends = np.cumsum(chunks)
    assert ends[-1] == tokens.shape[1]
    parts = [np.array(model(mx.array(tokens[:, end - n : end]), cache)) for n, end in zip(chunks, ends)]
    return np.concatenate(parts, axis=1)


def difference(a: np.ndarray, b: np.ndarray) -> float:
    """The largest absolute difference; NaN counts as infinite."""
    return float(np.nan_to_num(np.abs(a - b), nan=np.inf).max())
