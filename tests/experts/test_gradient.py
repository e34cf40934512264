"""Experts that stream refuse a gradient: when the backward step runs, a slot may hold another expert."""

import mlx.core as mx
import pytest
from support.converted import converted_directory

from mlx_mimo import load
from mlx_mimo.errors import MimoError

TOKENS = mx.array([[5, 6, 7, 8, 20, 21, 33, 40, 41, 50, 60, 70]])


def gradient(model) -> mx.array:
    """The gradient of a loss by the scale of the first layer's norm; it passes through the experts above."""
    norm = model.layers[0].input_layernorm
    weight = norm.weight

    def loss(scale: mx.array) -> mx.array:
        norm.weight = weight * scale
        return mx.logsumexp(model(TOKENS), axis=-1).sum()

    try:
        return mx.grad(loss)(mx.array(1.0))
    finally:
        norm.weight = weight


@pytest.mark.parametrize("kernels", ["0", "1"])
@pytest.mark.parametrize("memory", ["30KB", "120KB"])
def test_streamed_experts_refuse_a_gradient(memory, kernels, monkeypatch):
    monkeypatch.setenv("MLX_MIMO_CPU_KERNELS", kernels)
    model, _ = load(converted_directory(), expert_memory=memory)
    with pytest.raises(MimoError, match="gradient"):
        mx.eval(gradient(model))
    experts, chosen = model.layers[1].mlp.switch_mlp, mx.array([[0, 1]])
    x = mx.ones((1, model.args.hidden_size))
    with pytest.raises(MimoError, match=r"derivative|gradient"):
        mx.eval(mx.jvp(lambda x: experts(x, chosen), [x], [x]))
    model.residency.close()


def test_resident_experts_give_the_gradient_of_mlx_lms_model(monkeypatch):
    from mlx.utils import tree_map
    from mlx_lm.utils import load_model

    monkeypatch.setenv("MLX_MIMO_CPU_KERNELS", "0")
    ours, _ = load(converted_directory(), expert_memory="all")
    theirs, _ = load_model(converted_directory())
    theirs.update(tree_map(lambda x: x.astype(mx.float32) if x.dtype == mx.bfloat16 else x, theirs.parameters()))
    expected = gradient(theirs)
    assert abs(expected.item()) > 1e-3
    assert gradient(ours).item() == pytest.approx(expected.item(), rel=1e-3)
    ours.residency.close()
