"""Usage profiles: which experts a workload used, so that the next run can start with them in memory. No MLX.

A profile is one JSON object: `format`, `version`, `model` (fingerprint of the expert files), `tokens`, and `uses`:
for each layer, how many tokens used each expert.
"""

import hashlib
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

import numpy as np

from ..checkpoint.record import ExpertFile
from ..errors import MimoError

FORMAT = "mlx-mimo expert profile"
VERSION = 1
_SAMPLE_BYTES = 4096


@dataclass(frozen=True)
class Profile:
    """`uses` maps a layer to (experts,) counts gathered over `tokens` tokens."""

    model: str
    tokens: float
    uses: dict[int, np.ndarray]


def fingerprint(files: dict[int, ExpertFile]) -> str:
    """A hash that differs between models: of shapes, and of the first bytes of each layer's first record.

    Raises MimoError for a file that cannot be read.
    """
    digest = hashlib.sha256()
    for layer, file in sorted(files.items()):
        shapes = [(t.name, t.dtype, t.shape) for t in file.layout.tensors]
        digest.update(repr((layer, file.num_experts, shapes)).encode())
        try:
            with open(file.path, "rb") as stream:
                stream.seek(file.data_offset)
                digest.update(stream.read(min(_SAMPLE_BYTES, file.layout.nbytes)))
        except OSError as error:
            raise MimoError(f"{file.path.name}: cannot be read: {error.strerror or error}") from error
    return digest.hexdigest()[:32]


def save_profile(path: str | os.PathLike[str], profile: Profile) -> None:
    """Writes a profile, in one step: a crash leaves the file as it was. Raises MimoError where it cannot be written."""
    path = Path(path)
    fields = {
        "format": FORMAT,
        "version": VERSION,
        "model": profile.model,
        "tokens": round(profile.tokens, 3),
        "uses": {str(layer): uses.tolist() for layer, uses in profile.uses.items()},
    }
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(json.dumps(fields), encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        raise MimoError(f"{path}: profile cannot be written: {error.strerror or error}") from error


def load_profile(path: str | os.PathLike[str], model: str, files: dict[int, ExpertFile]) -> Profile:
    """Reads a profile made with this model. Raises MimoError, beginning with the file's name, for anything else."""
    path = Path(path)
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise MimoError(f"{path.name}: profile cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise MimoError(f"{path.name}: not a profile ({error}); delete it") from None
    if not isinstance(fields, dict) or fields.get("format") != FORMAT:
        raise MimoError(f"{path.name}: not a profile; an object with format {FORMAT!r} expected")
    if fields.get("version") != VERSION:
        raise MimoError(f"{path.name}: profile version {fields.get('version')!r}, {VERSION} expected; delete it")
    if fields.get("model") != model:
        raise MimoError(f"{path.name}: profile of another model; keep one file for each model")
    tokens, uses = fields.get("tokens"), fields.get("uses")
    if not _is_count(tokens) or not isinstance(uses, dict) or set(uses) != {str(layer) for layer in files}:
        raise MimoError(f"{path.name}: damaged profile: its layers are not the model's; delete it")
    counts = {}
    for layer, file in files.items():
        row = uses[str(layer)]
        if not isinstance(row, list) or len(row) != file.num_experts or not all(_is_count(n) for n in row):
            raise MimoError(f"{path.name}: damaged profile: layer {layer} has no {file.num_experts} counts; delete it")
        counts[layer] = np.array(row, dtype=np.int64)
    return Profile(model, float(tokens), counts)


def _is_count(value: object) -> TypeGuard[int | float]:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return math.isfinite(value) and 0 <= value < 2**53
