"""Ways to change a checkpoint's files, for the tests of what the converter refuses."""

import json
import shutil
from pathlib import Path

import numpy as np

from mlx_mimo.checkpoint.header import read_header
from support import checkpoints

NUMPY = {"F8_E4M3": np.uint8, "BF16": np.uint16, "F32": np.float32, "U32": np.uint32, "U8": np.uint8}


def copy(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


def load(path: Path) -> dict[str, tuple[str, np.ndarray]]:
    """{name: (dtype, array as stored)} of a safetensors file."""
    data, tensors = path.read_bytes(), {}
    for entry in read_header(path).tensors.values():
        raw = data[entry.offset : entry.offset + entry.nbytes]
        tensors[entry.name] = entry.dtype, np.frombuffer(raw, NUMPY[entry.dtype]).reshape(entry.shape).copy()
    return tensors


def load_all(directory: Path) -> dict[str, tuple[str, np.ndarray]]:
    tensors = {}
    for path in sorted(directory.glob("*.safetensors")):
        tensors |= load(path)
    return tensors


def edit(directory: Path, name: str, change) -> None:
    """Stores `change(array)` in place of a tensor."""
    path = directory / weight_map(directory)[name]
    tensors = load(path)
    dtype, array = tensors[name]
    tensors[name] = dtype, change(array)
    checkpoints.write_safetensors(path, tensors)


def weight_map(directory: Path) -> dict[str, str]:
    return json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]


def edit_json(path: Path, change) -> None:
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))
