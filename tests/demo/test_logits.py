"""Our FP8 reader, K/V map and model give transformers' logits on the demo checkpoint."""

import numpy as np
import pytest
from demo.demo_weights import CONFIG, GOLDEN, KEPT, checkpoint_hash, our_weights, prompts
from models.model_cases import difference, mlx_model, run

TOLERANCE = 1e-4  # absolute


@pytest.fixture(scope="module")
def model():
    return mlx_model(CONFIG, our_weights())


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN) as file:
        arrays = dict(file)
    assert str(arrays.pop("checkpoint")) == checkpoint_hash(), "the checkpoint changed: run tests/demo/make_golden.py"
    return arrays


def test_whole_prompts_have_transformers_logits(model, golden):
    for name, ids in prompts().items():
        assert difference(run(model, ids)[0, -KEPT:], golden[name]) < TOLERANCE, name


def test_prompts_in_chunks_and_token_by_token_have_transformers_logits(model, golden):
    for name, ids in prompts().items():
        length = ids.shape[1]
        chunks = [length - 5 - (length - 5) // 2, (length - 5) // 2, 1, 1, 1, 1, 1]
        assert difference(run(model, ids, chunks)[0, -KEPT:], golden[name]) < TOLERANCE, name


def test_some_prompts_pass_the_window_several_times():
    assert max(ids.shape[1] for ids in prompts().values()) > 300 > 9 * CONFIG["sliding_window_size"]


@pytest.mark.torch
def test_the_golden_file_is_what_transformers_computes(golden):
    pytest.importorskip("torch")
    from demo.make_golden import reference_logits

    for name, logits in reference_logits().items():
        assert difference(logits, golden[name]) < TOLERANCE / 2, name  # torch rounds otherwise on another processor


def test_reading_without_the_chain_changes_the_logits(model, golden):
    """The flat reading of K and V that other tools use changes the logits by far more than rounding does."""
    from support.converted import DEMO_CHECKPOINT

    from mlx_mimo.convert import fp8
    from mlx_mimo.convert.compute import kv_names, kv_scales
    from mlx_mimo.convert.source import open_source

    source = open_source(DEMO_CHECKPOINT)
    weights = our_weights()
    for layer, sliding in enumerate(CONFIG["hybrid_layer_pattern"]):
        if not sliding:
            for name, scales in zip(kv_names(layer), kv_scales(source, CONFIG, layer)["flat"]):
                weights[name] = fp8.dequantize(source.read(name), scales)
    flat = mlx_model(CONFIG, weights)
    ids = prompts()["arithmetic-off-0"]
    assert difference(run(flat, ids)[0, -KEPT:], golden["arithmetic-off-0"]) > 100 * TOLERANCE
