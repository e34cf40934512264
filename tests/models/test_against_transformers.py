"""The model beside transformers' own, live, on random configurations; skipped where torch is not installed."""

import random

import numpy as np
import pytest
from models.model_cases import CASES, TOLERANCE, difference, mlx_model, run
from support import checkpoints

pytest.importorskip("torch")
pytest.importorskip("transformers")

from models.torch_reference import reference_logits

pytestmark = pytest.mark.torch


def random_config(seed: int) -> dict:
    rng = random.Random(seed)
    layers = rng.choice([2, 3])
    kv_heads = rng.choice([1, 2])
    heads = 2 * kv_heads * rng.choice([1, 2])
    window = rng.choice([1, 7, 64, 128])
    experts = rng.choice([4, 9, 16])
    return checkpoints.tiny_config(
        vocab_size=64,
        hidden_size=rng.choice([64, 192]),
        intermediate_size=192,
        moe_intermediate_size=rng.choice([32, 160]),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        swa_num_attention_heads=heads,
        swa_num_key_value_heads=2 * kv_heads,
        hybrid_layer_pattern=[0, *rng.choices([0, 1], k=layers - 2), 1],
        moe_layer_freq=[0] + [1] * (layers - 1),
        sliding_window=window,
        sliding_window_size=window,
        n_routed_experts=experts,
        num_experts_per_tok=rng.randint(1, 4),
        norm_topk_prob=rng.random() < 0.7,
        routed_scaling_factor=rng.choice([None, 1.7]),
        attention_value_scale=rng.choice([0.707, None, 0.3]),
        layernorm_epsilon=rng.choice([1e-5, 1e-2]),
        partial_rotary_factor=rng.choice([0.334, 1.0, 0.25]),
        rope_theta=rng.choice([5_000_000, 100.0]),
        swa_rope_theta=rng.choice([10_000, 300.0]),
    )


@pytest.mark.parametrize("seed", range(5))
def test_random_configurations(seed):
    config = random_config(seed)
    weights = checkpoints.random_weights(config, seed, mtp=False)
    tokens = np.random.default_rng(seed).integers(0, 64, (1, 310))
    expected = reference_logits(config, weights, tokens)
    model = mlx_model(config, weights)
    window = config["sliding_window_size"]
    assert difference(run(model, tokens), expected) < TOLERANCE
    assert difference(run(model, tokens, [window, 1, 1, 2, 150, 156 - window]), expected) < TOLERANCE


def test_the_golden_files_are_what_transformers_computes():
    case = CASES["short_window"]
    expected = reference_logits(case.config, case.weights(), case.tokens())
    assert difference(case.golden(), expected) < TOLERANCE / 2  # torch rounds otherwise on another processor


def test_a_padded_batch_of_two_lengths():
    case = CASES["short_window"]
    tokens = case.tokens()[:, :320]
    rows = np.concatenate([tokens, np.roll(tokens, 7)])
    padding = 115
    attended = np.ones_like(rows)
    attended[1, :padding] = 0
    expected = reference_logits(case.config, case.weights(), rows, attention_mask=attended)
    model = mlx_model(case.config, case.weights())
    cache = [layer.merge([layer, layer]) for layer in model.make_cache()]
    for layer in cache:
        layer.prepare(left_padding=[0, padding])
    found = run(model, rows, [100, 10, 190, 1, 1, 18], cache)
    assert difference(found[0], expected[0]) < TOLERANCE
    assert difference(found[1, padding:], expected[1, padding:]) < TOLERANCE
