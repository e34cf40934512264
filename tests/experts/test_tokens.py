"""The whole model decodes the same tokens greedily, whatever part of its experts is resident."""

import warnings

import mlx.core as mx
import numpy as np
import pytest
from support.converted import converted_directory

from mlx_mimo import load

EXPERTS, DEMAND = 3 * 8, 3 * 2  # of the tiny checkpoint: three MoE layers of eight, two a token
RESIDENCIES = [EXPERTS // 2, EXPERTS // 4, EXPERTS // 8, DEMAND, DEMAND // 2, 1]


def open_model(slots=None, policy="lfu", lookahead=False):
    size = 0
    if slots is not None:
        model, _ = load(converted_directory(), expert_memory="all")
        size = model.residency.counters.slot_bytes
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, _ = load(
            converted_directory(),
            expert_memory="all" if slots is None else slots * size,
            expert_policy=policy,
            lookahead=lookahead,
        )
    assert model.residency.all_resident if slots is None else model.residency.counters.slots == slots
    return model


def greedy(model, prompts: np.ndarray, count: int, chunk: int) -> tuple[np.ndarray, mx.array]:
    """prompts (B, L) → tokens (B, count), and the logits (B, vocab) of the last step."""
    cache = model.make_cache()
    for start in range(0, prompts.shape[1] - 1, chunk):
        model.prefill(mx.array(prompts[:, start : min(start + chunk, prompts.shape[1] - 1)]), cache)
        mx.eval([c.state for c in cache])
    token, tokens = mx.array(prompts[:, -1:]), []
    for _ in range(count):
        logits = model(token, cache)[:, -1]
        token = logits.argmax(axis=-1, keepdims=True)
        mx.eval(token)
        tokens.append(np.array(token)[:, 0])
    return np.stack(tokens, axis=1), logits


def prompts(batch: int, length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (batch, length))


def check(slots, policy, lookahead, chunk, batch, count, truth):
    model = open_model(slots, policy, lookahead)
    tokens, logits = greedy(model, prompts(batch, 70), count, chunk)
    np.testing.assert_array_equal(tokens, truth[0])
    assert mx.array_equal(logits, truth[1]), "decode logits are bit-identical"
    model.residency.reader.drain()  # guesses may still be on their way
    counters = model.residency.counters
    record = model.residency.pools[0].layout.nbytes
    assert counters.bytes_read == (counters.misses + counters.lookahead_reads) * record
    model.residency.close()


@pytest.mark.parametrize(
    ("chunk", "batch"), [(64, 4), *(pytest.param(chunk, 1, marks=pytest.mark.long) for chunk in (2048, 3))]
)
def test_tokens_do_not_depend_on_residency(chunk, batch):
    truth = greedy(open_model(), prompts(batch, 70), 24, chunk)
    for step, slots in enumerate(RESIDENCIES):
        check(slots, ("lfu", "lru")[step % 2], step % 3 == 0, chunk, batch, 24, truth)


WAYS = [("lfu", False), ("lru", False), ("lfu", True), ("lru", True)]  # policy, look-ahead


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("chunk", [1, 3, 64, 2048])
def test_a_thousand_tokens_do_not_depend_on_residency(chunk, batch):
    """Each chunk size and batch tries every residency in one of the ways; all chunk sizes together try all ways."""
    truth = greedy(open_model(), prompts(batch, 70), 1000, chunk)
    turn = [1, 3, 64, 2048].index(chunk) + batch // 2
    for step, slots in enumerate(RESIDENCIES):
        check(slots, *WAYS[(step + turn) % 4], chunk, batch, 1000, truth)


def test_logits_do_not_depend_on_chunk_size_or_batch():
    model = open_model(EXPERTS // 4)
    wanted = greedy(model, prompts(4, 70), 1, 2048)[1]
    for chunk in (1, 3, 64):
        assert mx.allclose(greedy(model, prompts(4, 70), 1, chunk)[1], wanted, rtol=0, atol=1e-4)
    for row in range(4):
        alone = greedy(model, prompts(4, 70)[row : row + 1], 1, 2048)[1]
        assert mx.allclose(alone, wanted[row : row + 1], rtol=0, atol=1e-4)


def test_prefill_skips_the_last_layers_experts():
    model = open_model(EXPERTS // 2)
    cache = model.make_cache()
    model.prefill(mx.array(prompts(1, 70)), cache)
    mx.eval([c.state for c in cache])
    (pool,) = model.residency.pools
    last = max(pool.files)
    base = pool.residents.base[last]
    assert pool.residents.uses[base : base + 8].sum() == 0
    assert pool.residents.uses.sum() == 2 * 70 * 2
