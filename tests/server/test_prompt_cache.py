"""Reused caches compute what fresh ones would, wherever a prompt branches off."""

import mlx.core as mx
import pytest
from checkpoints import tiny_config

from mlx_mimo.models.config import ModelArgs
from mlx_mimo.models.mimo_v2_flash import Model
from mlx_mimo.server.prompt_cache import Checkpoint, Entry, PromptCache

PAST = [(7 * i) % 250 for i in range(400)]  # far past the window (16 keys) and its slack


@pytest.fixture(scope="module")
def model() -> Model:
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


@pytest.mark.parametrize(
    ("shared", "reused"),
    [(400, 400), (399, 399), (340, 340), (300, 40), (40, 40), (39, 20), (20, 20), (19, 0)],
)
def test_a_branch_continues_from_the_best_place(model, shared, reused):
    cache = PromptCache()
    cache.give(computed(model, PAST, checkpoints=(20, 40)))
    tokens = [*PAST[:shared], 251, 252, 253]
    entry = cache.take(tokens)
    assert (0 if entry is None else len(entry.tokens)) == reused
    if entry is not None:
        assert continues(model, entry, tokens)


def test_a_branch_leaves_the_original_as_it_was(model):
    cache = PromptCache()
    cache.give(computed(model, PAST, checkpoints=(20,)))
    for shared in (20, 380):
        branch = cache.take([*PAST[:shared], 251, 252])
        model(mx.array([[251, 252] * 20]), cache=branch.caches)
    assert continues(model, cache.take([*PAST, 252]), [*PAST, 252])


def test_one_token_is_always_left_to_compute(model):
    cache = PromptCache()
    cache.give(computed(model, PAST))
    assert len(cache.take(PAST).tokens) == len(PAST) - 1


def test_limits_hold_and_the_least_recently_used_leaves(model):
    cache = PromptCache(max_entries=2)
    for first in (1, 2, 3):
        cache.give(computed(model, [first, *PAST[:10]]))
    assert [entry.tokens[0] for entry in cache.entries] == [2, 3]
    small = PromptCache(max_bytes=cache.entries[0].nbytes)
    for entry in cache.entries:
        small.give(entry)
    assert [entry.tokens[0] for entry in small.entries] == [3]
    assert small.nbytes <= small.max_bytes


def test_an_entry_that_another_contains_leaves(model):
    cache = PromptCache()
    cache.give(computed(model, PAST[:390]))
    cache.give(computed(model, PAST))
    assert [len(entry.tokens) for entry in cache.entries] == [400]
