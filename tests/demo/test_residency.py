"""With few experts in memory tokens and logits stay the same, and a prefill reads no record twice."""

import json
import warnings
from collections import Counter

import mlx.core as mx
import numpy as np
import pytest
from support.converted import DEMO_CHECKPOINT, demo_directory

from mlx_mimo import load

pytestmark = pytest.mark.long  # The demo at every residency.


RECORDS = 5 * 32  # five MoE layers of 32 experts; a token needs 5 * 4
RESIDENCIES = {"50 %": 80, "25 %": 40, "12.5 %": 20, "half of a token's demand": 10, "one slot": 1}


def open_model(slots: int | None = None, policy: str = "lfu", lookahead: bool = False):
    everything = load(demo_directory(), expert_memory="all")
    if slots is None:
        return everything
    size = everything[0].residency.counters.slot_bytes
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # below one token's demand it warns
        return load(demo_directory(), expert_memory=slots * size, expert_policy=policy, lookahead=lookahead)


def questions(tokenizer, length: int) -> np.ndarray:
    """Returns (1, length) ids: held-out questions of all domains, concatenated."""
    ids = []
    lines = (DEMO_CHECKPOINT.parent / "heldout.jsonl").read_text().splitlines()
    for line in [*lines[::7], *lines[1::7], *lines[2::7]]:
        text = tokenizer.apply_chat_template(
            json.loads(line)["messages"], add_generation_prompt=False, enable_thinking=False, tokenize=False
        )
        ids += tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) >= length
    return np.array([ids[:length]])


def greedy(model, prompts: np.ndarray, count: int, chunk: int) -> tuple[np.ndarray, mx.array]:
    """Returns tokens (B, count), and logits (B, vocabulary) of the last step, for prompts (B, L)."""
    cache, length = model.make_cache(), prompts.shape[1] - 1
    for start in range(0, length, chunk):
        model.prefill(mx.array(prompts[:, start : min(start + chunk, length)]), cache)
        mx.eval([c.state for c in cache])
    token, tokens = mx.array(prompts[:, -1:]), []
    for _ in range(count):
        logits = model(token, cache)[:, -1]
        token = logits.argmax(axis=-1, keepdims=True)
        tokens.append(np.array(token)[:, 0])
    return np.stack(tokens, axis=1), logits


def check(slots: int, policy: str, lookahead: bool, prompts: np.ndarray, count: int, chunk: int, truth: tuple) -> None:
    model, _ = open_model(slots, policy, lookahead)
    tokens, logits = greedy(model, prompts, count, chunk)
    np.testing.assert_array_equal(tokens, truth[0])
    assert mx.array_equal(logits, truth[1])
    model.residency.reader.drain()  # guesses may still be on their way
    counters = model.residency.counters
    record = model.residency.pools[0].layout.nbytes
    assert counters.bytes_read == (counters.misses + counters.lookahead_reads) * record
    model.residency.close()


@pytest.mark.parametrize("slots", RESIDENCIES.values(), ids=RESIDENCIES.keys())
def test_tokens_are_the_same_at_every_residency(slots):
    model, tokenizer = open_model()
    prompts = questions(tokenizer, 200)
    truth = greedy(model, prompts, 32, 64)
    for policy in ("lfu", "lru"):
        check(slots, policy, policy == "lru", prompts, 32, 64, truth)


WAYS = [("lfu", False), ("lru", False), ("lfu", True), ("lru", True)]  # policy, look-ahead


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("chunk", [1, 3, 64, 2048])
def test_a_thousand_tokens_are_the_same_at_every_residency(chunk, batch):
    """Each chunk size and batch runs every residency in one of the ways; the chunk sizes together run all of them."""
    model, tokenizer = open_model()
    prompts = questions(tokenizer, 100 * batch).reshape(batch, 100)
    truth = greedy(model, prompts, 1000, chunk)
    turn = [1, 3, 64, 2048].index(chunk) + batch // 2
    for step, slots in enumerate(RESIDENCIES.values()):
        check(slots, *WAYS[(step + turn) % 4], prompts, 1000, chunk, truth)


def test_2048_tokens_at_an_eighth_read_each_record_at_most_once_a_layer():
    model, tokenizer = open_model(RECORDS // 8)
    prompts = questions(tokenizer, 2048)
    (pool,) = model.residency.pools
    reads: Counter = Counter()
    read = pool.reader.submit

    def counted(wanted, *rest, **named):
        reads.update((request.layer, request.expert) for request in wanted)
        return read(wanted, *rest, **named)

    pool.reader.submit = counted
    logits = model(mx.array(prompts), model.make_cache())
    mx.eval(logits)
    assert reads.total() > 100, "nearly every expert is needed, and few of them fit"
    assert max(reads.values()) == 1
    record = pool.layout.nbytes
    assert model.residency.counters.bytes_read == reads.total() * record
    whole, _ = open_model()
    assert mx.array_equal(logits, whole(mx.array(prompts), whole.make_cache()))


def test_logits_agree_across_chunk_sizes_and_batches():
    model, tokenizer = open_model(RECORDS // 8)
    prompts = questions(tokenizer, 400).reshape(4, 100)
    wanted = greedy(model, prompts, 1, 2048)[1]
    for chunk in (1, 3, 64):
        assert mx.allclose(greedy(model, prompts, 1, chunk)[1], wanted, rtol=0, atol=1e-4)
    for row in range(4):
        alone = greedy(model, prompts[row : row + 1], 1, 2048)[1]
        assert mx.allclose(alone, wanted[row : row + 1], rtol=0, atol=1e-4)
