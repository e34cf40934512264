"""Experts computed by kernels: see `experts.compute.Compute`."""

import weakref

import mlx.core as mx
import numpy as np

from ..checkpoint.packing import quantizations
from ..checkpoint.record import PROJECTIONS, RecordLayout
from .host import on_host
from .packed import Packed, format_of
from .products import ExpertMatrices, run_experts

_DTYPES = {"U32": mx.uint32, "U8": mx.uint8, "BF16": mx.bfloat16, "F16": mx.float16, "F32": mx.float32}


class KernelCompute:
    """Reads the banks in place, scales and biases in 16 bits; see `products.run_experts`."""

    widen = False
    takes_lazy = False

    def __init__(self, layout: RecordLayout, hidden_size: int):
        self.packing = quantizations(layout, hidden_size)
        self._experts: dict[int, tuple[list[weakref.ref], ExpertMatrices]] = {}  # by the id of a dict of banks

    @classmethod
    def takes(cls, layout: RecordLayout, hidden_size: int) -> bool:
        """Whether the kernels read this record's formats."""
        tensors = {tensor.name: tensor for tensor in layout.tensors}
        for projection, packing in quantizations(layout, hidden_size).items():
            dtype = _DTYPES.get(tensors[f"{projection}.weight"].dtype)
            if dtype is None or (dtype == mx.uint32 and packing is None):
                return False
            if packing and format_of(dtype, packing.bits, packing.group_size, packing.mode) is None:
                return False
            if not packing and format_of(dtype) is None:
                return False
        return True

    def __call__(self, x: mx.array, slots, banks: dict[str, mx.array], grouped: bool = False) -> mx.array:
        """x (T, hidden), slots (T, K) → (T, K, hidden); `grouped`: some pairs of a call of several tokens."""
        slots, expert = np.asarray(slots), self._expert(banks)
        return on_host(lambda rows: run_experts(rows, slots, expert, grouped))(x)

    def _expert(self, banks: dict[str, mx.array]) -> ExpertMatrices:
        """The banks as matrices, made again only when a bank was replaced (a pool that changed its size)."""
        weights = [banks[f"{projection}.weight"] for projection in PROJECTIONS]
        known, expert = self._experts.get(id(banks), ((), None))
        if expert is None or any(ref() is not weight for ref, weight in zip(known, weights)):
            # Only weak references: a pool that shrinks must be able to free its banks.
            expert = ExpertMatrices(*(self._matrix(projection, banks) for projection in PROJECTIONS))
            self._experts[id(banks)] = [weakref.ref(weight) for weight in weights], expert
        return expert

    def _matrix(self, projection: str, banks: dict[str, mx.array]) -> Packed:
        weight, packing = banks[f"{projection}.weight"], self.packing[projection]
        if packing is None:
            return Packed(weight, borrowed=True)
        return Packed(
            weight,
            banks[f"{projection}.scales"],
            banks.get(f"{projection}.biases"),
            bits=packing.bits,
            group_size=packing.group_size,
            mode=packing.mode,
            borrowed=True,
        )
