"""MLXCompute equals mlx-lm's own layer, for pairs in the router's order and for pairs sorted by expert."""

import mlx.core as mx
import numpy as np
import pytest
from support.tiny_experts import EXPERTS, HIDDEN, random_experts, reference_glu, write_expert_file

from mlx_mimo.checkpoint.record import open_expert_file
from mlx_mimo.experts.banks import memory_dtype
from mlx_mimo.experts.compute import MLXCompute


@pytest.mark.parametrize("form", ["affine4", "mxfp4", "bf16"])
def test_pairs_are_computed_alike_in_any_order(tmp_path, form):
    tensors = random_experts(form)
    layout = open_expert_file(write_expert_file(tmp_path, 1, tensors)).layout
    compute = MLXCompute(layout, HIDDEN)
    banks = {t.name: tensors[t.name].astype(memory_dtype(t, compute.widen)) for t in layout.tensors}
    rng = np.random.default_rng(0)
    x = mx.array(rng.standard_normal((40, HIDDEN)), dtype=mx.float32)
    slots = rng.integers(0, EXPERTS, (40, 1)).astype(np.int32)
    want = reference_glu(tensors)(x, mx.array(slots))
    order = np.argsort(slots[:, 0], kind="stable")
    rows, sorted_slots = x[mx.array(order)], slots[order]
    for found, target in [
        (compute(x, slots, banks), want),
        (compute(rows, sorted_slots, banks, grouped=True), want[mx.array(order)]),
        (compute(rows, mx.array(sorted_slots), banks, grouped=True), want[mx.array(order)]),
    ]:
        assert found.shape == (40, 1, HIDDEN)
        assert mx.allclose(found, target, atol=1e-5)
