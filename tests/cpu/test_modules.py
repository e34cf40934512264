"""Modules with kernels equal MLX's in float32, refuse transformations, and replace MLX's in a loaded model."""

import importlib.util
import os
import stat
import subprocess
import sys

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

pytest.importorskip("numba")

import numba
from mlx_lm.models.switch_layers import SwitchGLU
from support.checkpoints import tiny_config
from support.converted import converted_directory

from mlx_mimo import load
from mlx_mimo.checkpoint.record import TENSOR_ORDER, RecordLayout
from mlx_mimo.cpu import kernel_cache, kernels
from mlx_mimo.cpu.experts import KernelCompute
from mlx_mimo.cpu.modules import KernelEmbedding, KernelLinear, KernelRouter, KernelSwitchGLU, has_kernel
from mlx_mimo.errors import MimoError
from mlx_mimo.experts.compute import MLXCompute


def close(got: mx.array, want: mx.array, tolerance: float = 1e-5) -> bool:
    return mx.abs(got - want).max().item() <= tolerance * mx.abs(want).max().item()


def narrowed(module: nn.Module) -> nn.Module:
    """Scales and biases in bfloat16, as they lie in a converted directory."""
    module.update({name: module[name].astype(mx.bfloat16) for name in ("scales", "biases") if name in module})
    return module


def widened(module: nn.Module) -> nn.Module:
    module.update({name: module[name].astype(mx.float32) for name in ("scales", "biases") if name in module})
    return module


def quantised_linear(bias: bool = False, **packing) -> nn.Module:
    return narrowed(nn.Linear(128, 50, bias=bias).to_quantized(**packing))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", [(1,), (1, 5), (2, 17)])
def test_linear_equals_mlx_in_float32(tokens, bias):
    linear = quantised_linear(bias, bits=4, group_size=64)
    x = mx.random.normal((*tokens, 128))
    got = KernelLinear(linear)(x)
    assert got.dtype == mx.float32
    assert close(got, widened(linear)(x))


def test_unquantised_linear_in_bfloat16():
    linear = nn.Linear(100, 30)
    linear.weight = linear.weight.astype(mx.bfloat16)
    x = mx.random.normal((3, 100))
    assert close(KernelLinear(linear)(x), x @ linear.weight.astype(mx.float32).T + linear.bias)


@pytest.mark.parametrize("mode", ["affine", "mxfp4"])
def test_embedding_and_its_transpose(mode):
    packing = {"group_size": 32, "bits": 4, "mode": mode}
    table = nn.Embedding(40, 64).to_quantized(**packing)
    if mode == "affine":
        table = narrowed(table)
    ours = KernelEmbedding(table)
    theirs = widened(table) if mode == "affine" else table
    tokens = mx.array([[3, 3, 39], [0, 7, 1]])
    assert ours(tokens).dtype == mx.float32
    assert close(ours(tokens), theirs(tokens).astype(mx.float32), 1e-6 if mode == "affine" else 0)
    x = mx.random.normal((1, 2, 64))
    assert close(ours.as_linear(x), theirs.as_linear(x))


@pytest.mark.parametrize("tokens", [1, 40])
def test_stacked_experts_equal_mlx(tokens):
    switch = SwitchGLU(64, 32, 5)
    nn.quantize(switch, group_size=32, bits=4)
    ours = KernelSwitchGLU(switch)
    x = mx.random.normal((1, tokens, 64))
    indices = mx.random.randint(0, 5, (1, tokens, 3))
    assert close(ours(x, indices), switch(x, indices))


def test_router_chooses_as_the_models_router():
    from mlx_mimo.config.model_args import ModelArgs
    from mlx_mimo.models.mimo_v2_flash import Router

    router = Router(ModelArgs.from_dict(tiny_config()))
    router.weight = mx.random.normal(router.weight.shape)
    router.e_score_correction_bias = mx.random.normal(router.e_score_correction_bias.shape)
    x = mx.random.normal((1, 30, 128))
    (ours, our_weights), (theirs, their_weights) = KernelRouter(router)(x), router(x)
    order, other = mx.argsort(ours), mx.argsort(theirs)
    assert mx.take_along_axis(ours, order, -1).tolist() == mx.take_along_axis(theirs, other, -1).tolist()
    assert close(mx.take_along_axis(our_weights, order, -1), mx.take_along_axis(their_weights, other, -1))


def banks_and_layout(bits=4, group=32, slots=6, hidden=64, inner=32):
    banks = {}
    for projection, shape in (("gate", (inner, hidden)), ("up", (inner, hidden)), ("down", (hidden, inner))):
        parts = mx.quantize(mx.random.normal((slots, *shape)), group_size=group, bits=bits)
        for part, value in zip(("weight", "scales", "biases"), parts):
            banks[f"{projection}_proj.{part}"] = value if part == "weight" else value.astype(mx.bfloat16)
    kinds = {mx.uint32: "U32", mx.bfloat16: "BF16"}
    layout = RecordLayout.of({n: (kinds[banks[n].dtype], banks[n].shape[1:], banks[n][0].nbytes) for n in TENSOR_ORDER})
    return banks, layout


@pytest.mark.parametrize("tokens", [1, 3, 50])
def test_kernels_compute_a_pools_experts_as_mlx_does(tokens):
    banks, layout = banks_and_layout()
    x, slots = mx.random.normal((tokens, 64)), np.random.default_rng(0).integers(0, 6, (tokens, 2)).astype(np.int32)
    wide = {name: b.astype(mx.float32) if b.dtype == mx.bfloat16 else b for name, b in banks.items()}
    compute = KernelCompute(layout, 64)
    want = MLXCompute(layout, 64)(x, slots, wide)
    assert close(compute(x, slots, banks), want)
    # A pool that changes its size puts new banks into the same dict.
    for name in banks:
        banks[name] = mx.concatenate([banks[name], banks[name]])
    assert close(compute(x, slots + 6, banks), want)


def test_one_tokens_experts_have_the_same_bits_alone_and_together():
    banks, layout = banks_and_layout()
    compute = KernelCompute(layout, 64)
    x = mx.random.normal((1, 64))
    together = compute(x, np.array([[0, 3, 5]], np.int32), banks)
    rows = compute(mx.concatenate([x, x]), np.array([[3], [5]], np.int32), banks)
    assert mx.array_equal(together[0, 1:], rows[:, 0])


# ---- refusals


def _sum(module):
    return lambda x: module(x).sum()


@pytest.mark.parametrize(
    "transformed",
    [
        lambda module, x: mx.grad(_sum(module))(x),
        lambda module, x: mx.value_and_grad(_sum(module))(x),
        lambda module, x: mx.jvp(module, [x], [x]),
        lambda module, x: mx.vmap(module)(x),
        lambda module, x: mx.compile(module)(x),
    ],
    ids=["grad", "value_and_grad", "jvp", "vmap", "compile"],
)
def test_transformations_are_refused(transformed):
    module = KernelLinear(quantised_linear(bits=4, group_size=64))
    with pytest.raises(MimoError, match="CPU kernels have no"):
        transformed(module, mx.ones((3, 128)))


def test_experts_refuse_gradients():
    banks, layout = banks_and_layout()
    compute, slots = KernelCompute(layout, 64), np.array([[0, 1]], np.int32)
    with pytest.raises(MimoError, match="no gradient"):
        mx.grad(lambda x: compute(x, slots, banks).sum())(mx.ones((1, 64)))


def test_formats_without_kernels_keep_mlxs_modules():
    assert not has_kernel(nn.Linear(128, 50, bias=False).to_quantized(group_size=32, bits=8, mode="mxfp8"))
    assert has_kernel(quantised_linear(bits=3, group_size=128))


# ---- in a model


def logits(model) -> mx.array:
    return model(mx.array([list(range(65, 105))]))


def test_load_uses_kernels_and_the_logits_equal_mlxs():
    ours, _ = load(converted_directory(), expert_memory="all")
    assert isinstance(ours.lm_head, KernelLinear)
    assert isinstance(ours.layers[1].mlp.gate, KernelRouter)
    os.environ["MLX_MIMO_CPU_KERNELS"] = "0"
    try:
        theirs, _ = load(converted_directory(), expert_memory="all")
    finally:
        del os.environ["MLX_MIMO_CPU_KERNELS"]
    assert isinstance(theirs.lm_head, nn.QuantizedLinear)
    assert close(logits(ours), logits(theirs), 1e-4)


@pytest.mark.parametrize("missing", ["numba", "threadpoolctl"])
def test_without_numba_load_warns_and_uses_mlx(monkeypatch, missing):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == missing else find(name))
    with pytest.warns(UserWarning, match="no numba"):
        model, _ = load(converted_directory(), expert_memory="all")
    assert isinstance(model.lm_head, nn.QuantizedLinear)
    assert logits(model).dtype == mx.float32


def test_the_number_of_threads_changes_no_bit():
    module, x = KernelLinear(quantised_linear(bits=4, group_size=64)), mx.random.normal((1, 128))
    want = module(x)
    before = kernels.threads()
    try:
        kernels.set_threads(1)
        assert mx.array_equal(module(x), want)
    finally:
        kernels.set_threads(before)


COMPILE = """
import mlx.core as mx, mlx.nn as nn
from mlx_mimo.cpu.modules import KernelLinear
KernelLinear(nn.Linear(64, 32, bias=False).to_quantized(group_size=64, bits=4))(mx.ones((1, 64)))
"""


def test_compilation_is_announced_once_and_cached(tmp_path):
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    runs = [
        subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True) for _ in "12"
    ]
    assert [run.returncode for run in runs] == [0, 0], runs[0].stderr
    assert [run.stderr.count("compiling kernels, once") for run in runs] == [1, 0]


def test_compiled_code_goes_to_the_users_cache_where_the_package_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    monkeypatch.setattr(kernel_cache, "writable", lambda folder: "mlx-mimo" in str(folder))
    monkeypatch.setattr(numba.config, "CACHE_DIR", "")
    kernel_cache.choose()
    assert "mlx-mimo" in numba.config.CACHE_DIR
    monkeypatch.setattr(kernel_cache, "writable", lambda folder: False)
    kernel_cache.choose()
    assert stat.S_IMODE(os.stat(numba.config.CACHE_DIR).st_mode) == 0o700
