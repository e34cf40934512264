"""Routing traces: which experts each call of each layer chose. No MLX.

A trace file is

    8 bytes   MIMOTRC1
    4 bytes   length of the header, little-endian
    header    JSON: layers (list of layer numbers), num_experts, top_k, model (fingerprint), slot_bytes
    frames    one a call: position of the layer in `layers` (2 bytes), tokens (4 bytes), then tokens * top_k expert
              numbers, one byte each where num_experts is at most 256, else two; all little-endian

so a decoded token of the full model takes 47 * (6 + 8) = 658 bytes. Readers leave out a last frame that was cut short.
"""

import json
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import MimoError

MAGIC = b"MIMOTRC1"
_FRAME = struct.Struct("<HI")


@dataclass(frozen=True)
class Call:
    """One call of one layer: `chosen` (tokens, top_k) expert numbers."""

    layer: int
    chosen: np.ndarray


@dataclass(frozen=True)
class Trace:
    """A trace file's content."""

    layers: tuple[int, ...]
    num_experts: int
    top_k: int
    model: str
    calls: list[Call]
    slot_bytes: int = 0  # memory of one expert where the trace was recorded; 0: not known

    @property
    def routed(self) -> int:
        """Token-expert pairs."""
        return sum(call.chosen.size for call in self.calls)


class TraceWriter:
    """Writes a trace: must be called with (layer, chosen (T, K)) for each call, and closed.

    Raises MimoError where the file cannot be written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        layers: Sequence[int],
        num_experts: int,
        top_k: int,
        model: str = "",
        slot_bytes: int = 0,
    ):
        self.path = Path(path)
        self._position = {layer: i for i, layer in enumerate(layers)}
        self._top_k = top_k
        self._dtype = _id_type(num_experts)
        header = {
            "layers": list(layers),
            "num_experts": num_experts,
            "top_k": top_k,
            "model": model,
            "slot_bytes": slot_bytes,
        }
        text = json.dumps(header).encode()
        try:
            self._file = open(self.path, "wb")  # noqa: SIM115 - open as long as the writer
            self._file.write(MAGIC + struct.pack("<I", len(text)) + text)
        except OSError as error:
            raise MimoError(f"{self.path}: trace cannot be written: {error.strerror or error}") from error

    def __call__(self, layer: int, chosen: np.ndarray) -> None:
        if chosen.shape[1] != self._top_k:
            raise ValueError(f"{chosen.shape[1]} experts a token in a trace of {self._top_k}")
        frame = _FRAME.pack(self._position[layer], chosen.shape[0]) + chosen.astype(self._dtype).tobytes()
        try:
            self._file.write(frame)
        except OSError as error:
            raise MimoError(f"{self.path}: trace cannot be written: {error.strerror or error}") from error

    def close(self) -> None:
        try:
            self._file.close()
        except OSError as error:  # buffered frames could not be written
            raise MimoError(f"{self.path}: trace cannot be written: {error.strerror or error}") from error


def read_trace(path: str | os.PathLike[str]) -> Trace:
    """Reads a trace file. Raises MimoError, beginning with the file's name, for anything else."""
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise MimoError(f"{path.name}: trace cannot be read: {error.strerror or error}") from error
    if data[:8] != MAGIC:
        raise MimoError(f"{path.name}: not a routing trace; record one with --trace")
    start = 12 + int.from_bytes(data[8:12], "little")
    try:
        header = json.loads(data[12:start])
        layers, num_experts, top_k = tuple(header["layers"]), header["num_experts"], header["top_k"]
        sane = layers and all(isinstance(n, int) for n in (*layers, num_experts, top_k))
        if not sane or not 1 <= top_k <= num_experts <= 65536:
            raise ValueError(f"{len(layers)} layers, {num_experts} experts, top {top_k}")
    except (KeyError, TypeError, ValueError) as error:
        raise MimoError(f"{path.name}: damaged trace header: {error}; record it again") from None
    slot_bytes = header.get("slot_bytes")
    slot_bytes = slot_bytes if isinstance(slot_bytes, int) and slot_bytes > 0 else 0
    calls = _frames(path, data, start, header)
    return Trace(layers, num_experts, top_k, str(header.get("model", "")), calls, slot_bytes)


def _frames(path: Path, data: bytes, at: int, header: dict[str, Any]) -> list[Call]:
    layers, top_k, dtype = header["layers"], header["top_k"], _id_type(header["num_experts"])
    calls = []
    while at + _FRAME.size <= len(data):
        position, tokens = _FRAME.unpack_from(data, at)
        if position >= len(layers):
            raise MimoError(f"{path.name}: damaged trace: layer position {position} of {len(layers)} at byte {at:,}")
        count, begin = tokens * top_k, at + _FRAME.size
        at = begin + count * dtype.itemsize
        if at > len(data):
            break
        chosen = np.frombuffer(data, dtype, count, begin).reshape(tokens, top_k)
        if count and int(chosen.max()) >= header["num_experts"]:
            raise MimoError(f"{path.name}: damaged trace: expert {chosen.max()} of {header['num_experts']}")
        calls.append(Call(layers[position], chosen.astype(np.int32)))
    return calls


def _id_type(num_experts: int) -> np.dtype[Any]:
    """The type of an expert number in the file."""
    return np.dtype("<u1" if num_experts <= 256 else "<u2")
