"""KV caches: the keys and values that attention gets, rollback, and use by mlx-lm."""

import copy
import random

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import BatchGenerator, generate_step, speculative_generate_step
from mlx_lm.models.cache import (
    KVCache,
    LRUPromptCache,
    can_trim_prompt_cache,
    load_prompt_cache,
    save_prompt_cache,
    trim_prompt_cache,
)
from models.model_cases import CASES, TOLERANCE, difference, mlx_model, run

from mlx_mimo.errors import MimoError
from mlx_mimo.models.cache import SLACK, SlidingKVCache, rollback

CASE = CASES["short_window"]  # 17 keys seen


@pytest.fixture(scope="module")
def model():
    return mlx_model(CASE.config, CASE.weights())


def block(start: int, length: int) -> tuple[mx.array, mx.array]:
    """Keys and values (1, 2, length, 1) whose numbers tell their token."""
    keys = mx.broadcast_to(mx.arange(start, start + length, dtype=mx.float32)[None, None, :, None], (1, 2, length, 1))
    return keys, keys + 0.5


# Against a list that never forgets


@pytest.mark.parametrize("seed", range(12))
def test_any_sequence_of_updates_and_rollbacks_equals_a_fresh_cache(seed):
    rng = random.Random(seed)
    window, slack = rng.choice([(1, 4), (2, 1), (5, 3), (17, 64), (9, 0)])
    cache, length, farthest, masked = SlidingKVCache(window, slack), 0, 0, 0
    for _ in range(150):
        n = rng.choice([1, 1, 1, 2, 3, window, rng.randint(1, 5 * (window + slack))])
        mask = cache.make_mask(n, window_size=window)
        keys, values = cache.update_and_fetch(*block(length, n))
        length += n
        seen = min(length, window - 1 + n)
        assert keys[0, 1, :, 0].tolist() == list(range(length - seen, length))
        assert mx.array_equal(values, keys + 0.5)
        if isinstance(mask, mx.array):
            masked += 1
            query, key = np.arange(length - n, length)[:, None], np.arange(length - seen, length)[None]
            assert np.array_equal(np.array(mask), (key <= query) & (key > query - window))
        elif mask == "causal":
            assert seen <= window
        farthest = max(farthest, length)
        assert cache.max_trim >= min(length, slack - (farthest - length))
        if rng.random() < 0.4:
            back = rng.randint(0, cache.max_trim)
            assert cache.trim(back) == back
            length -= back
        assert cache.offset == length
    assert masked > 10


def test_a_long_chunk_does_not_stay_in_memory():
    cache = SlidingKVCache(129)
    cache.update_and_fetch(*block(0, 2048))
    assert cache.keys.shape[2] == 128 + SLACK
    for token in range(2048, 2648):
        cache.update_and_fetch(*block(token, 1))
    assert cache.keys.shape[2] <= 2 * (128 + SLACK)


# Taking back


@pytest.mark.parametrize(("before", "gone"), [(50, 30), (50, 1), (10, 20), (200, SLACK)])
def test_a_rollback_equals_never_having_computed_the_tokens(model, before, gone):
    tokens, golden = CASE.tokens()[:, : before + 30], CASE.golden()[:, : before + 30]
    elsewhere = (tokens[:, :1] + np.arange(gone) * 7) % 60
    cache = model.make_cache()
    run(model, tokens[:, :before], [before - 5, 5], cache)
    run(model, elsewhere, [1, 1, gone - 2] if gone > 2 else [gone], cache)
    assert rollback(cache, gone)
    assert difference(run(model, tokens[:, before:], [1, 29], cache), golden[:, before:]) < TOLERANCE


def test_rolling_back_too_far_is_rejected_and_changes_nothing(model):
    tokens, golden = CASE.tokens()[:, :310], CASE.golden()[:, :310]
    cache = model.make_cache()
    run(model, tokens[:, :300], [300], cache)
    assert not rollback(cache, SLACK + 1)
    assert not can_trim_prompt_cache(cache)
    assert trim_prompt_cache(cache, 5) == 0
    with pytest.raises(MimoError, match=f"{SLACK + 1} tokens to be taken back, at most {SLACK} can be"):
        cache[1].trim(SLACK + 1)
    assert difference(run(model, tokens[:, 300:], [10], cache), golden[:, 300:]) < TOLERANCE


def test_before_the_window_has_moved_any_length_can_be_trimmed(model):
    cache = model.make_cache()
    run(model, CASE.tokens()[:, :60], [60], cache)
    assert can_trim_prompt_cache(cache)
    assert trim_prompt_cache(cache, 55) == 55
    assert difference(run(model, CASE.tokens()[:, 5:40], [35], cache), CASE.golden()[:, 5:40]) < TOLERANCE


# mlx-lm's users of caches


def greedy(model, prompt: list[int], n: int) -> list[int]:
    return [
        int(token) for token, _ in zip((t for t, _ in generate_step(mx.array(prompt), model, max_tokens=n)), range(n))
    ]


def greedy_without_cache(model, prompt: list[int], n: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(n):
        tokens.append(int(mx.argmax(model(mx.array([tokens]))[0, -1])))
    return tokens[len(prompt) :]


def test_mlx_lms_generate_step_takes_our_caches(model):
    prompt = CASE.tokens()[0, :40].tolist()
    assert greedy(model, prompt, 12) == greedy_without_cache(model, prompt, 12)


def test_mlx_lms_speculative_decoding_is_exact_past_the_window(model):
    prompt = CASE.tokens()[0, :120].tolist()
    draft = mlx_model(CASE.config | {"attention_value_scale": 0.6}, CASE.weights())  # right now and then
    step = speculative_generate_step(mx.array(prompt), model, draft, max_tokens=40, num_draft_tokens=3)
    found = [(int(token), drafted) for token, _, drafted in step]
    assert [token for token, _ in found] == greedy(model, prompt, 40)
    assert {drafted for _, drafted in found} == {True, False}  # some were accepted, some were not


@pytest.mark.parametrize("lengths", [(5, 40), (60, 100, 12), (30, 30)])
def test_sequences_of_a_batch_generate_as_they_do_alone(model, lengths):
    prompts = [CASE.tokens()[0, i : i + n].tolist() for i, n in enumerate(lengths)]
    generator = BatchGenerator(model, max_tokens=25, prefill_step_size=16)
    uids = generator.insert(prompts)
    found = {uid: [] for uid in uids}
    while responses := generator.next_generated():
        for response in responses:
            found[response.uid].append(response.token)
    assert list(found.values()) == [greedy(model, prompt, 25) for prompt in prompts]


def merged(model, caches: list[list]) -> list:
    return [layer[0].merge(list(layer)) for layer in zip(*caches)]


def test_batch_caches_merge_extend_filter_and_extract(model):
    """Sequences join and leave a batch; each one's logits stay those it has alone."""
    tokens = CASE.tokens()
    starts, lengths = (0, 3, 7), (100, 20, 45)

    def alone(i: int, more: int) -> np.ndarray:
        end = starts[i] + lengths[i] + more
        return run(model, tokens[:, starts[i] : end])[:, -1]

    caches = []
    for start, length in zip(starts, lengths):
        cache = model.make_cache()
        run(model, tokens[:, start : start + length], [length], cache)
        caches.append(cache)

    def step(cache: list, rows: list[int], done: int) -> np.ndarray:
        """Computes one more token for each of `rows` after `done` tokens."""
        ids = [[int(tokens[0, starts[i] + lengths[i] + done])] for i in rows]
        return np.array(model(mx.array(ids), cache))[:, -1]

    batch = merged(model, caches[:2])
    for done in range(3):
        out = step(batch, [0, 1], done)
    for row in (0, 1):
        assert difference(out[row : row + 1], alone(row, 3)) < TOLERANCE
    third = merged(model, caches[2:])
    for done in range(3):
        step(third, [2], done)
    for cache, other in zip(batch, third):
        cache.extend(other)
    out = step(batch, [0, 1, 2], 3)
    for row in range(3):
        assert difference(out[row : row + 1], alone(row, 4)) < TOLERANCE
    for cache in batch:
        cache.filter([2, 1])
    out = step(batch, [2, 1], 4)
    assert difference(out, np.concatenate([alone(2, 5), alone(1, 5)])) < TOLERANCE
    single = [cache.extract(1) for cache in batch]
    assert [type(c) for c in single] == [type(c) for c in model.make_cache()]
    assert difference(step(single, [1], 5), alone(1, 6)) < TOLERANCE


def test_a_sequence_that_left_a_batch_and_was_rolled_back_joins_another(model):
    """As where a prompt is asked again: its cache comes from the batch before, and its last token is computed anew."""
    tokens = CASE.tokens()
    again, other = model.make_cache(), model.make_cache()
    run(model, tokens[:, :40], [40], again)
    batch = merged(model, [again])
    for token in (40, 41):
        model(mx.array(tokens[:, token : token + 1]), batch)
    again = [cache.extract(0) for cache in batch]
    assert rollback(again, 1)
    run(model, tokens[:, :12], [12], other)
    batch = merged(model, [again, other])
    for done in range(20):
        ids = mx.array([[int(tokens[0, 41 + done])], [int(tokens[0, 12 + done])]])
        out = np.array(model(ids, batch))[:, -1]
        assert difference(out[0], CASE.golden()[0, 41 + done]) < TOLERANCE
        assert difference(out[1], CASE.golden()[0, 12 + done]) < TOLERANCE


def test_a_left_padded_batch_in_one_call_equals_single_calls(model):
    """The short row is padded on the left, as mlx-lm's batch caches expect it."""
    tokens = CASE.tokens()
    batch = [layer.merge([layer, layer]) for layer in model.make_cache()]
    for cache in batch:
        cache.prepare(left_padding=[0, 130])
    short = tokens[:, 50:220]
    rows = np.concatenate([tokens[:, :300], np.pad(short, ((0, 0), (130, 0)))])
    out = run(model, rows, [140, 160], batch)
    assert difference(out[:1], CASE.golden()[:, :300]) < TOLERANCE
    assert difference(out[1:, 130:], run(model, short)) < TOLERANCE


@pytest.mark.parametrize("length", [10, 100])
def test_a_cache_that_was_saved_and_loaded_continues(model, tmp_path, length):
    cache = model.make_cache()
    run(model, CASE.tokens()[:, :length], [length], cache)
    path = str(tmp_path / "cache.safetensors")
    save_prompt_cache(path, cache, {"model": "tiny"})
    loaded, metadata = load_prompt_cache(path, return_metadata=True)
    assert metadata == {"model": "tiny"}
    assert [type(c) for c in loaded] == [type(c) for c in cache]
    rest = CASE.tokens()[:, length : length + 40]
    assert difference(run(model, rest, [1, 39], loaded), CASE.golden()[:, length : length + 40]) < TOLERANCE


def test_mlx_lms_prompt_cache_never_returns_a_wrong_cache(model):
    """It trims longer entries to a common prefix where `is_trimmable` allows it."""
    tokens = CASE.tokens()[0].tolist()
    store = LRUPromptCache()
    for length in (40, 300):
        cache = model.make_cache()
        run(model, CASE.tokens()[:, :length], [length - 1, 1], cache)
        store.insert_cache("m", tokens[:length], cache)
    other = [*tokens[:200], *[(t + 1) % 60 for t in tokens[200:230]]]
    cache, rest = store.fetch_nearest_cache("m", other)
    assert rest == other[40:]  # the shorter entry, whole
    logits = run(model, np.array([rest]), [len(rest)], cache)
    assert difference(logits, run(model, np.array([other]))[:, 40:]) < TOLERANCE


def test_copies_of_a_cache_are_independent():
    cache = SlidingKVCache(5)
    cache.update_and_fetch(*block(0, 9))
    other = copy.deepcopy(cache)
    cache.update_and_fetch(*block(100, 1))
    keys, _ = other.update_and_fetch(*block(9, 1))
    assert keys[0, 0, :, 0].tolist() == [5, 6, 7, 8, 9]


def test_sliding_caches_reject_quantisation(model):
    with pytest.raises(MimoError, match="--kv-bits"):
        model.make_cache()[1].to_quantized()
    assert isinstance(model.make_cache()[0], KVCache)
