"""How experts are computed from banks; this does not know how the banks were filled."""

from collections.abc import Callable
from itertools import pairwise
from typing import Protocol

import mlx.core as mx
import numpy as np
from mlx_lm.models.activations import swiglu

from ..checkpoint.packing import quantizations
from ..checkpoint.record import RecordLayout

Slots = np.ndarray | mx.array


class Compute(Protocol):
    """Computes experts from banks. An expert's output must not depend on what else is computed with it."""

    widen: bool  # whether 16-bit floats must be stored in the banks as float32
    takes_lazy: bool  # whether `slots` may be an mx.array that has not been evaluated

    def __call__(self, x: mx.array, slots: Slots, banks: dict[str, mx.array], grouped: bool = False) -> mx.array:
        """x (T, hidden), slots (T, K) → (T, K, hidden): row t through the K experts in its slots.

        `slots` is a NumPy array of int32, or an mx.array of integers where `takes_lazy` is true. `banks` maps a tensor
        of the record ("gate_proj.weight") to (slots, *shape). `grouped` promises that K is 1 and equal slots are
        adjacent: pairs of a call of several tokens, sorted by expert.
        """
        ...


ComputeFor = Callable[[RecordLayout, int], Compute]  # (layout of a record, hidden size)


class MLXCompute:
    """MLX's gathered matmuls, as mlx-lm runs them; one matmul for each expert where slots are known and grouped.

    On the CPU banks are widened: scales of another type than the activations' (float32) would make MLX cast whole
    banks, and `gather_mm` takes float32 only.
    """

    takes_lazy = True

    def __init__(self, layout: RecordLayout, hidden_size: int):
        self.packing = quantizations(layout, hidden_size)
        self.widen = mx.default_device() == mx.cpu

    def __call__(self, x: mx.array, slots: Slots, banks: dict[str, mx.array], grouped: bool = False) -> mx.array:
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

    def _gathered(self, x: mx.array, indices: mx.array, banks: dict[str, mx.array], grouped: bool) -> mx.array:
        up = self._gather(x, "up_proj", indices, banks, grouped)
        gate = self._gather(x, "gate_proj", indices, banks, grouped)
        return self._gather(swiglu(gate, up), "down_proj", indices, banks, grouped)

    def _gather(
        self, x: mx.array, projection: str, indices: mx.array, banks: dict[str, mx.array], grouped: bool
    ) -> mx.array:
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

    def _one(self, x: mx.array, slot: int, banks: dict[str, mx.array]) -> mx.array:
        """x (P, hidden) through the expert in `slot`."""
        up = self._matmul(x, "up_proj", slot, banks)
        gate = self._matmul(x, "gate_proj", slot, banks)
        return self._matmul(swiglu(gate, up), "down_proj", slot, banks)

    def _matmul(self, x: mx.array, projection: str, slot: int, banks: dict[str, mx.array]) -> mx.array:
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
