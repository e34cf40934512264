"""Prompt caches of a tiny model, and whether they may be relied on."""

import mlx.core as mx

from mlx_mimo.config.model_args import ModelArgs
from mlx_mimo.models.mimo_v2_flash import Model
from mlx_mimo.server.engine.prompt_cache import Checkpoint, Entry
from support.checkpoints import tiny_config

PAST = [(7 * i) % 250 for i in range(400)]  # far past the window (16 keys) and its slack


def tiny_model() -> Model:
    """With random weights."""
    mx.random.seed(0)
    model = Model(ModelArgs.from_dict(tiny_config()))
    mx.eval(model.parameters())
    return model


def computed(model, tokens: list[int], checkpoints: tuple[int, ...] = ()) -> Entry:
    entry = Entry(list(tokens), model.make_cache())
    done = 0
    for end in (*checkpoints, len(tokens)):
        model(mx.array([tokens[done:end]]), cache=entry.caches)
        done = end
        if end in checkpoints:
            entry.checkpoints.append(Checkpoint.of(entry.caches))
    return entry


def continues(model, entry: Entry, tokens: list[int]) -> bool:
    """Whether the rest of `tokens` through the entry's caches gives what all of them through fresh ones give."""
    rest = mx.array([tokens[len(entry.tokens) :]])
    fresh = model(mx.array([tokens]), cache=model.make_cache())[:, -1]
    return bool(mx.allclose(model(rest, cache=entry.caches)[:, -1], fresh, atol=1e-4))
