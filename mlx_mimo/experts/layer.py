"""The experts of an MoE layer, computed through a pool or from banks that hold them all.

Both replace `layer.mlp.switch_mlp` and are called like mlx-lm's SwitchGLU: `(x, indices)` → one output for each token
and chosen expert, in the router's order. No bit of an output depends on where its expert lay or when it was read.
"""

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..checkpoint.record import ExpertFile
from ..errors import MimoError
from .banks import Banks, host_bytes
from .compute import Compute, Slots
from .pool import Pool
from .reader import ExpertReader, ReadRequest
from .residents import SORTED_PAIRS, Need

ENOUGH_WAITING = (
    0.5  # share of reads' time spent waiting from which on computing hits first is faster; docs/RESIDENCY.md
)


@mx.custom_function
def _constant(x: mx.array) -> mx.array:
    """x; taking a derivative through it raises MimoError: in the backward step a slot may hold another expert."""
    return x


def _refuse(*_: Any) -> None:
    raise MimoError(
        "experts that stream have no gradient; load the model with all experts resident (--expert-memory all)"
    )


@mx.custom_function
def _computed(y: mx.array, x: mx.array) -> mx.array:
    """y, computed on the host from x; taking a derivative raises MimoError, where without this it would be 0."""
    return y


for _function in (_constant, _computed):
    _function.vjp(_refuse)
    _function.jvp(_refuse)


@dataclass(frozen=True)
class Lookahead:
    """The next MoE layer, whose experts are guessed during a layer's call."""

    layer: int
    pool: Pool
    router: Callable[[mx.array], tuple[mx.array, mx.array]]  # x → (indices, weights)


class StreamedSwitchGLU(nn.Module):
    """The experts of layer `layer` through `pool`.

    `hits_first` computes hits while misses are read; None does so only while reads wait for the disk. These may be set
    afterwards: `ahead` reads what the next layer will probably need, `trace` is called with (layer, chosen experts) in
    each call, and `before` is called at the beginning of each call.
    """

    def __init__(self, layer: int, pool: Pool, compute: Compute, hits_first: bool | None = False):
        super().__init__()  # type: ignore[no-untyped-call]
        self.layer = layer
        self.pool = pool
        self.compute = compute
        self.hits_first = hits_first
        self.ahead: Lookahead | None = None
        self.trace: Callable[[int, np.ndarray], None] | None = None
        self.before: Callable[[], None] | None = None

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        """x (..., hidden), indices (..., K) → (..., K, hidden)."""
        if self.before is not None:
            self.before()
        if self.compute.takes_lazy:  # the kernels refuse derivatives themselves
            x = cast(mx.array, _constant(x))
        *rows, hidden = x.shape
        top_k = indices.shape[-1]
        guesses = self._guess(x, indices, self.ahead) if self.ahead and indices.size < SORTED_PAIRS else None
        chosen = np.array(indices).reshape(-1, top_k).astype(np.int32)  # (T, K); waits for the router
        x = x.reshape(-1, hidden)
        if self.trace is not None:
            self.trace(self.layer, chosen)
        if chosen.size == 0:
            return mx.zeros((*rows, top_k, hidden), dtype=x.dtype)
        if chosen.size < SORTED_PAIRS:
            y = self._decode(x, chosen, guesses)
        else:
            y = self._prefill(x, chosen)
        if not self.compute.takes_lazy:
            y = cast(mx.array, _computed(y, x))
        return y.reshape(*rows, top_k, hidden)

    def _decode(self, x: mx.array, chosen: np.ndarray, guesses: np.ndarray | None) -> mx.array:
        """x (T, hidden), chosen (T, K) → (T, K, hidden), computed in one piece where the slots suffice."""
        parts: Parts | None = None
        ahead = self.ahead if guesses is not None else None
        hits_first = self.pool.reader.waiting > ENOUGH_WAITING if self.hits_first is None else self.hits_first
        with closing(self.pool.serve(Need.of(self.layer, chosen), hits_first, hold=guesses is not None)) as steps:
            for step in steps:
                if step.last and ahead and guesses is not None and not self.compute.takes_lazy:
                    ahead.pool.guess(ahead.layer, guesses)  # read while the host computes
                if step.last and parts is None:
                    y = self.compute(x, self.pool.slots_of(self.layer, chosen), self.pool.arrays)
                else:
                    parts = parts or self._parts(chosen)
                    parts.add(self._pairs(x, parts.select(step.experts), chosen), evaluate=not step.last)
                    if step.last:
                        y = parts.joined()
                if step.last and self.compute.takes_lazy:
                    self.pool.lazily(y)
                    if ahead and guesses is not None:
                        mx.async_eval(y)  # type: ignore[no-untyped-call]
                        ahead.pool.guess(ahead.layer, guesses)
        return y

    def _prefill(self, x: mx.array, chosen: np.ndarray) -> mx.array:
        """x (T, hidden), chosen (T, K) → (T, K, hidden), a wave's pairs at a time, sorted by expert."""
        parts = self._parts(chosen)
        with closing(self.pool.serve(Need.of(self.layer, chosen))) as steps:
            for step in steps:
                parts.add(self._pairs(x, parts.select(step.experts), chosen), evaluate=not step.last)
            y = parts.joined()
            if self.compute.takes_lazy:
                self.pool.lazily(y)
        return y

    def _parts(self, chosen: np.ndarray) -> "Parts":
        return Parts(chosen, on_host=not self.compute.takes_lazy)

    def _pairs(self, x: mx.array, pairs: np.ndarray, chosen: np.ndarray) -> mx.array:
        """The outputs (P, hidden) of `pairs`, numbers token * K + k sorted by expert."""
        slots = self.pool.slots_of(self.layer, chosen.reshape(-1)[pairs])
        if chosen.shape[0] == 1:
            return self.compute(x, slots[None], self.pool.arrays)[0]
        rows = x[mx.array(pairs // chosen.shape[1])]
        return self.compute(rows, slots[:, None], self.pool.arrays, grouped=True)[:, 0]

    def _guess(self, x: mx.array, indices: mx.array, ahead: Lookahead) -> np.ndarray:
        """The experts that the next layer's router chooses for this layer's input. Evaluates `indices` too."""
        guesses = ahead.router(x)[0]
        mx.eval(indices, guesses)
        return np.unique(np.array(guesses)).astype(np.int32)


class Parts:
    """The outputs of a call's pairs, computed a few experts at a time.

    With `on_host`, each output is copied to its place at once, for kernels that computed it on the host: joined on the
    device, all outputs would be in memory three times.
    """

    def __init__(self, chosen: np.ndarray, on_host: bool = False):
        self.shape = chosen.shape
        self._on_host = on_host
        self._joined: mx.array | None = None
        self._experts = chosen.reshape(-1)
        self._order = np.argsort(self._experts, kind="stable")
        self._sorted = self._experts[self._order]
        self._pairs: list[np.ndarray] = []
        self._outputs: list[mx.array] = []

    def select(self, experts: np.ndarray) -> np.ndarray:
        """The pairs of `experts`, sorted by expert and then by token. The caller must `add` their outputs next."""
        experts = np.sort(experts)
        begins, ends = np.searchsorted(self._sorted, experts), np.searchsorted(self._sorted, experts, side="right")
        pairs = np.concatenate([self._order[a:b] for a, b in zip(begins, ends)])
        self._pairs.append(pairs)
        return pairs

    def add(self, output: mx.array, evaluate: bool) -> None:
        """Takes `output` (P, hidden), of the pairs selected last."""
        if self._on_host:
            if self._joined is None:
                self._joined = mx.zeros((self._experts.size, output.shape[-1]), dtype=output.dtype)
            host_bytes(self._joined)[self._pairs[-1]] = host_bytes(output)
            return
        if evaluate:
            mx.eval(output)
        self._outputs.append(output)

    def joined(self) -> mx.array:
        """(T, K, hidden) of all pairs."""
        if self._joined is not None:
            return self._joined.reshape(*self.shape, -1)
        place = np.empty(self._experts.size, dtype=np.int32)
        place[np.concatenate(self._pairs)] = np.arange(place.size, dtype=np.int32)
        return mx.concatenate(self._outputs)[mx.array(place)].reshape(*self.shape, -1)


class ResidentSwitchGLU(nn.Module):
    """All experts of a layer in banks of their own, expert e in slot e, so that no call waits for the router.

    Reads them all when it is made. Raises MimoError for a record that cannot be read.
    """

    def __init__(self, file: ExpertFile, reader: ExpertReader, compute: Compute, in_place: bool | None = None):
        super().__init__()  # type: ignore[no-untyped-call]
        self.layer = file.layer
        self.compute = compute
        self.trace: Callable[[int, np.ndarray], None] | None = None
        self.banks = Banks(file.layout, file.num_experts, compute.widen, in_place)
        for start in range(0, file.num_experts, 32):
            slots = range(start, min(start + 32, file.num_experts))
            reader.read([ReadRequest(file.layer, slot, self.banks.buffers(slot)) for slot in slots])
            self.banks.landed(slots)

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        """x (..., hidden), indices (..., K) → (..., K, hidden)."""
        *rows, hidden = x.shape
        top_k = indices.shape[-1]
        x = x.reshape(-1, hidden)
        slots: Slots = indices.reshape(-1, top_k)
        if self.trace is not None or not self.compute.takes_lazy:
            slots = chosen = np.array(slots).astype(np.int32)
            if self.trace is not None:
                self.trace(self.layer, chosen)
        if indices.size < SORTED_PAIRS:
            y = self.compute(x, slots, self.banks.arrays)
        elif isinstance(slots, np.ndarray):
            parts = Parts(slots)
            pairs = parts.select(np.unique(slots))
            y = self.compute(x[mx.array(pairs // top_k)], slots.reshape(-1, 1)[pairs], self.banks.arrays, grouped=True)
            parts.add(y[:, 0], evaluate=False)
            y = parts.joined()
        else:
            order = mx.argsort(slots.reshape(-1))
            y = self.compute(x[order // top_k], slots.reshape(-1, 1)[order], self.banks.arrays, grouped=True)
            y = y.reshape(-1, hidden)[mx.argsort(order)]
        return y.reshape(*rows, top_k, hidden)
