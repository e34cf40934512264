"""The experts' arithmetic: tokens through rows of banks. How the banks got filled is not known here.

A strategy is called `(x, slots, banks, grouped)`:

- x (T, hidden): activations;
- slots (T, K): row t goes through the K experts in these slots; a NumPy array of int32, or where `takes_lazy` an
  mx.array of any integer type;
- banks: tensor name of the record ("gate_proj.weight") → (slots, *shape);
- grouped: K is 1 and equal slots are adjacent: some or all pairs of a call of several tokens, an expert's together.

and returns (T, K, hidden). An expert's output must not depend on what else is computed with it. `widen` says that
16-bit floats must lie in the banks as float32.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Protocol

import mlx.core as mx
import numpy as np
from mlx_lm.models.activations import swiglu

from ..checkpoint.packing import quantizations
from ..checkpoint.record import RecordLayout


class Compute(Protocol):
    widen: bool
    takes_lazy: bool

    def __call__(self, x: mx.array, slots, banks: dict[str, mx.array], grouped: bool = False) -> mx.array: ...


ComputeFor = Callable[[RecordLayout, int], Compute]  # (layout of a record, hidden size)


class MLXCompute:
    """MLX's gathered matmuls, as stock mlx-lm runs them; for many tokens one matmul an expert.

    On the CPU, scales must have the activations' type (float32) or MLX casts whole banks, and `gather_mm` takes
    nothing else: there the banks are widened.
    """

    takes_lazy = True

    def __init__(self, layout: RecordLayout, hidden_size: int):
        self.packing = quantizations(layout, hidden_size)
        self.widen = mx.default_device() == mx.cpu

    def __call__(self, x: mx.array, slots, banks: dict[str, mx.array], grouped: bool = False) -> mx.array:
        if not grouped:
            indices = mx.array(slots)
            y = self._gathered(x[:, None, None, :], indices, banks, False)
            return y.squeeze(-2)
        if isinstance(slots, mx.array):
            return self._gathered(x[:, None, :], slots[:, 0], banks, True)
        slots = slots[:, 0]
        edges = np.flatnonzero(np.diff(slots)) + 1
        bounds = [0, *edges.tolist(), slots.size]
        parts = [self._one(x[a:b], int(slots[a]), banks) for a, b in pairwise(bounds)]
        return mx.concatenate(parts)[:, None]

    def _gathered(self, x, indices, banks, grouped) -> mx.array:
        up = self._gather(x, "up_proj", indices, banks, grouped)
        gate = self._gather(x, "gate_proj", indices, banks, grouped)
        return self._gather(swiglu(gate, up), "down_proj", indices, banks, grouped)

    def _gather(self, x, projection, indices, banks, grouped) -> mx.array:
        weight, packing = banks[f"{projection}.weight"], self.packing[projection]
        if packing is None:
            return mx.gather_mm(x, weight.swapaxes(-1, -2), rhs_indices=indices, sorted_indices=grouped)
        return mx.gather_qmm(
            x,
            weight,
            banks[f"{projection}.scales"],
            banks.get(f"{projection}.biases"),
            rhs_indices=indices,
            transpose=True,
            group_size=packing.group_size,
            bits=packing.bits,
            mode=packing.mode,
            sorted_indices=grouped,
        )

    def _one(self, x, slot, banks) -> mx.array:
        """x (P, hidden) through one expert."""
        up = self._matmul(x, "up_proj", slot, banks)
        gate = self._matmul(x, "gate_proj", slot, banks)
        return self._matmul(swiglu(gate, up), "down_proj", slot, banks)

    def _matmul(self, x, projection, slot, banks) -> mx.array:
        weight, packing = banks[f"{projection}.weight"][slot], self.packing[projection]
        if packing is None:
            return x @ weight.T
        biases = banks.get(f"{projection}.biases")
        return mx.quantized_matmul(
            x,
            weight,
            banks[f"{projection}.scales"][slot],
            None if biases is None else biases[slot],
            transpose=True,
            group_size=packing.group_size,
            bits=packing.bits,
            mode=packing.mode,
        )
