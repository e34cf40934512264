"""The memory of a pool: one contiguous array for each tensor of the record; a slot is one row of each.

Where the backend lets the host write into an evaluated array (CPU, Metal), records are read straight into the slot.
Elsewhere (CUDA) they are read into a buffer that `landed` copies. `host_writable` finds out by trying.
"""

from collections.abc import Iterable, Sequence
from math import prod

import mlx.core as mx
import numpy as np

from ..checkpoint.record import RecordLayout, RecordTensor
from ..cpu.pages import make_large
from ..errors import MimoError

DTYPES = {
    "U32": mx.uint32,
    "U8": mx.uint8,
    "BF16": mx.bfloat16,
    "F16": mx.float16,
    "F32": mx.float32,
}
_WIDENED = ("BF16", "F16")


def memory_dtype(tensor: RecordTensor, widen: bool) -> mx.Dtype:
    """A tensor's type in a slot; `widen` stores 16-bit floats as float32. Raises MimoError for an unknown type."""
    if tensor.dtype not in DTYPES:
        raise MimoError(f"{tensor.name}: experts of type {tensor.dtype}; one of {', '.join(DTYPES)} expected")
    return mx.float32 if widen and tensor.dtype in _WIDENED else DTYPES[tensor.dtype]


def slot_bytes(layout: RecordLayout, widen: bool = False) -> int:
    """The memory of one slot: the record's size, more where 16-bit floats are widened."""
    return sum(prod(t.shape) * memory_dtype(t, widen).size for t in layout.tensors)


def most_slots(layout: RecordLayout, widen: bool = False) -> int | None:
    """The most slots that a buffer of this device can hold; None where no limit is known."""
    limit = int(mx.device_info().get("max_buffer_length", 0)) if mx.default_device() == mx.gpu else 0
    largest = max(prod(t.shape) * memory_dtype(t, widen).size for t in layout.tensors)
    return limit // largest if limit else None


def host_writable() -> bool:
    """Whether the default device computes with bytes that the host wrote into an evaluated array."""
    bank = mx.zeros((4, 64), dtype=mx.uint32)
    mx.eval(bank)
    try:
        view = host_bytes(bank)
        for value in (0x01, 0x7F):  # the second write comes after the device has read the first
            view[2] = value
            want = int.from_bytes(bytes([value] * 4), "little")
            row = mx.bitwise_xor(bank, mx.array(0, dtype=mx.uint32)).tolist()
            if row != [[0] * 64, [0] * 64, [want] * 64, [0] * 64]:
                return False
    except (BufferError, RuntimeError, TypeError, ValueError):
        return False
    return True


def host_bytes(bank: mx.array) -> np.ndarray:
    """A bank as (slots, bytes of a row), in the bank's own memory where the backend allows it."""
    raw = bank.view(mx.uint8)
    mx.eval(raw)
    return np.asarray(raw).reshape(bank.shape[0], -1)


class Banks:
    """`slots` slots for records of `layout`; `arrays` maps a tensor's name to its bank (slots, *shape).

    No other code may assign into `arrays`: an update by MLX may move a bank away from the host's views. Before bytes
    are written into a slot, the caller must evaluate every output that reads it.
    """

    def __init__(self, layout: RecordLayout, slots: int, widen: bool = False, in_place: bool | None = None):
        self.layout = layout
        self.widen = widen
        self.in_place = host_writable() if in_place is None else in_place
        self.slot_bytes = slot_bytes(layout, widen)
        self.arrays: dict[str, mx.array] = {}
        self._bytes: dict[str, np.ndarray] = {}
        self._staged: dict[int, np.ndarray] = {}
        for tensor in layout.tensors:
            self._allocate(tensor, slots)

    @property
    def slots(self) -> int:
        """The slots of the longest bank; all are equally long unless memory ran out during `resize`."""
        return max(bank.shape[0] for bank in self.arrays.values())

    def buffers(self, slot: int) -> list[memoryview]:
        """The buffers for the record of `slot`, in order. The caller must call `landed` or `abandon` after the read."""
        if not self.in_place:
            staged = self._staged[slot] = np.empty(self.layout.nbytes, dtype=np.uint8)
            return [staged.data]
        return [self._bytes[t.name][slot, -t.nbytes :].data for t in self.layout.tensors]

    def landed(self, slots: Iterable[int]) -> None:
        """Makes the records that were read into the buffers of `slots` available to the device."""
        numbers = [int(slot) for slot in slots]
        if not self.in_place:
            if numbers:
                self._copy(numbers)
        elif self.widen:
            for tensor in self.layout.tensors:
                if tensor.dtype in _WIDENED:
                    for slot in numbers:
                        _widen(self._bytes[tensor.name][slot], tensor)

    def abandon(self, slots: Iterable[int]) -> None:
        """Discards the buffers of `slots`, whose reads failed; the slots' content is undefined afterwards."""
        for slot in slots:
            self._staged.pop(int(slot), None)

    def abandon_all(self) -> None:
        """Discards all buffers. No read may be running."""
        self._staged.clear()

    def move(self, moves: Sequence[tuple[int, int]]) -> None:
        """Copies slots (from, to); no slot may be on both sides."""
        if not moves:
            return
        sources, targets = (list(side) for side in zip(*moves))
        for name, bank in self.arrays.items():
            if self.in_place:
                for source, target in moves:
                    self._bytes[name][target] = self._bytes[name][source]
            else:
                bank[mx.array(targets)] = bank[mx.array(sources)]
                mx.eval(bank)

    def resize(self, slots: int) -> None:
        """Makes every bank `slots` long; slots that remain keep their content.

        Banks are replaced one by one, so the peak is all banks and a second copy of the largest. May be called again
        after an error for want of memory.
        """
        for tensor in self.layout.tensors:
            old, old_bytes = self.arrays[tensor.name], self._bytes.get(tensor.name)
            if old.shape[0] == slots:  # resized by a call for which memory ran out later
                continue
            rows = min(slots, old.shape[0])
            if old_bytes is not None:
                self._allocate(tensor, slots)
                self._bytes[tensor.name][:rows] = old_bytes[:rows]
            else:
                rest = mx.zeros((slots - rows, *tensor.shape), dtype=old.dtype)
                bank = mx.concatenate([old[:rows], rest])
                mx.eval(bank)
                self.arrays[tensor.name] = bank

    def _allocate(self, tensor: RecordTensor, slots: int) -> None:
        bank = mx.zeros((slots, *tensor.shape), dtype=memory_dtype(tensor, self.widen))
        mx.eval(bank)
        self.arrays[tensor.name] = bank
        if self.in_place:
            self._bytes[tensor.name] = host_bytes(bank)
            if mx.default_device() == mx.cpu:
                make_large(self._bytes[tensor.name])

    def _copy(self, slots: list[int]) -> None:
        records = [self._staged.pop(slot) for slot in slots]
        for tensor in self.layout.tensors:
            part = slice(tensor.offset, tensor.offset + tensor.nbytes)
            raw = mx.array(np.stack([record[part] for record in records]))
            bank = self.arrays[tensor.name]
            rows = raw.view(DTYPES[tensor.dtype]).reshape(len(slots), *tensor.shape)
            bank[mx.array(slots)] = rows.astype(bank.dtype)
            mx.eval(bank)


def _widen(row: np.ndarray, tensor: RecordTensor) -> None:
    """Turns the second half of a row's bytes, 16-bit floats, into float32 over the whole row."""
    if tensor.dtype == "BF16":
        row.view(np.uint32)[:] = row[tensor.nbytes :].view(np.uint16).astype(np.uint32) << 16
    else:
        row.view(np.float32)[:] = row[tensor.nbytes :].view(np.float16).astype(np.float32)
