"""A layer on the host equals the model's own code, in every cache; with many tokens the model's own code runs."""

import functools
import itertools

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

pytest.importorskip("numba")

from mlx_lm.models.cache import KVCache
from support.checkpoints import tiny_config

from mlx_mimo.config.model_args import ModelArgs
from mlx_mimo.cpu import decode
from mlx_mimo.cpu.adapt import use_cpu_kernels
from mlx_mimo.cpu.decode import MAX_HOST_ROWS, HostDecoderLayer, angles, rotated
from mlx_mimo.errors import MimoError
from mlx_mimo.models.mimo_v2_flash import DecoderLayer, Model


@pytest.fixture(scope="module")
def model() -> Model:
    mx.random.seed(3)
    model = Model(ModelArgs.from_dict(tiny_config()))
    for layer in model.layers:
        if layer.self_attn.attention_sink_bias is not None:
            layer.self_attn.attention_sink_bias = mx.random.normal((layer.self_attn.n_heads,))
        layer.input_layernorm.weight = 1 + 0.1 * mx.random.normal(layer.input_layernorm.weight.shape)
    nn.quantize(model, group_size=32, bits=8, class_predicate=lambda path, m: isinstance(m, nn.Linear))
    mx.eval(model.parameters())
    return use_cpu_kernels(model)


def by_the_models_layers(model, ids, cache):
    """The logits computed by the model's own layers."""
    classes = [type(layer) for layer in model.layers]
    try:
        for layer in model.layers:
            layer.__class__ = DecoderLayer
        logits = model(ids, cache)
        mx.eval(logits)
    finally:
        for layer, kind in zip(model.layers, classes):
            layer.__class__ = kind
    return logits


def difference(a, b):
    return np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(np.asarray(b)).max()


def test_every_layer_of_the_model_is_computed_on_the_host(model):
    assert all(type(layer) is HostDecoderLayer for layer in model.layers)
    assert {layer.is_sliding for layer in model.layers} == {True, False}


EDGES = [(1, 0, 1), (3, 0, 7), (1, 1, 2), (3, 127, 1), (1, 127, 2), (1, 128, 1), (3, 129, 2), (1, 260, 7)]
PRODUCT = itertools.product([1, 3], [0, 1, 126, 127, 128, 129, 260], [1, 2, 7])


@pytest.mark.parametrize(
    ("batch", "before", "length"),
    [*EDGES, *(pytest.param(*case, marks=pytest.mark.long) for case in PRODUCT if case not in EDGES)],
)
def test_equals_the_models_own_layers(model, batch, before, length):
    ids = mx.random.randint(0, model.args.vocab_size, (batch, before + length), key=mx.random.key(before))
    ours, theirs = model.make_cache(), model.make_cache()
    if before:
        by_the_models_layers(model, ids[:, :before], ours), by_the_models_layers(model, ids[:, :before], theirs)
    got, want = model(ids[:, before:], ours), by_the_models_layers(model, ids[:, before:], theirs)
    assert difference(got, want) < 1e-5
    # The caches hold the same keys and values too.
    step = ids[:, :1]
    assert difference(model(step, ours), by_the_models_layers(model, step, theirs)) < 1e-5


def test_equals_the_models_own_layers_without_a_cache(model):
    ids = mx.array([[5, 6, 7, 8]])
    assert difference(model(ids), by_the_models_layers(model, ids, None)) < 1e-5


def test_more_than_max_host_rows_are_computed_by_the_models_layers(model, monkeypatch):
    calls = []
    monkeypatch.setattr(HostDecoderLayer, "_forward", lambda self, x, *_: calls.append(len(x)) or x)
    ids = mx.zeros((1, MAX_HOST_ROWS + 1), dtype=mx.int32)
    mx.eval(model(ids, model.make_cache()))
    assert not calls
    mx.eval(model(ids[:, :MAX_HOST_ROWS], model.make_cache()))
    assert len(calls) == len(model.layers)


def test_a_gradient_is_refused(model):
    layer = model.layers[0]
    with pytest.raises(MimoError, match="gradient"):
        mx.grad(lambda x: layer(x).sum())(mx.zeros((1, 1, model.args.hidden_size)))


@pytest.mark.parametrize("length", [1, MAX_HOST_ROWS + 1])
def test_a_gradient_for_any_parameter_is_refused(model, length):
    """mx.grad replaces a parameter by a tracer; if the host ignored it, its gradient would be 0."""
    ids = mx.zeros((1, length), dtype=mx.int32)
    layer = next(layer for layer in model.layers if layer.self_attn.attention_sink_bias is not None)
    for name, value in tree_flatten(layer.parameters()):
        *path, last = name.split(".")
        owner = functools.reduce(lambda at, part: at[part], path, layer)

        def loss(value, owner=owner, last=last):
            owner[last] = value
            return model(ids).sum()

        try:
            with pytest.raises(MimoError, match="gradient"):
                mx.grad(loss)(value)
        finally:
            owner[last] = value


def test_a_quantised_cache_is_refused(model):
    cache = KVCache().to_quantized(group_size=32, bits=8)
    with pytest.raises(MimoError, match="kv-bits"):
        model.layers[0](mx.zeros((1, 1, model.args.hidden_size)), None, cache)


def test_a_layer_with_a_module_without_kernel_keeps_its_class(model):
    layer = DecoderLayer(model.args, 1)
    decode.adopt(layer)
    assert type(layer) is DecoderLayer


@pytest.mark.parametrize(("offset", "length"), [(0, 1), (129, 1), (5000, 4)])
def test_rotation_equals_mlx(offset, length):
    rope = nn.RoPE(64, traditional=False, base=5e6)
    x = np.random.default_rng(0).normal(size=(2, 3, length, 192)).astype(np.float32)
    got = rotated(x, *angles(rope, offset, length))
    assert difference(got, rope(mx.array(x), offset=offset)) < 1e-6
