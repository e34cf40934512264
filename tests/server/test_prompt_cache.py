"""Reused caches compute what fresh ones would, wherever a prompt branches off."""

import mlx.core as mx
import pytest
from support.cached import PAST, computed, continues, tiny_model

from mlx_mimo.models.mimo_v2_flash import Model
from mlx_mimo.server.engine.prompt_cache import PromptCache


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny_model()


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
