"""The manifest of a converted directory, as it is read: what was converted how, and every file's size and sha256."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import FormatError

MANIFEST = "mlx_mimo.json"
FORMAT = 1


@dataclass(frozen=True)
class FileRecord:
    """One file as the conversion left it. config.json is counted without the bridge's line."""

    nbytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    fields: dict[str, Any]  # the JSON object as it was read
    files: dict[str, FileRecord]

    @property
    def recipe_name(self) -> str | None:
        recipe = self.fields.get("recipe")
        return recipe.get("name") if isinstance(recipe, dict) else None

    @property
    def kv_scales(self) -> dict[str, dict[str, Any]]:
        """{global layer: {"map", "cells", "cells_without_448"}}; empty where no K/V scales were read."""
        return self.fields.get("kv_scales") or {}


def read_manifest(directory: Path) -> Manifest | None:
    """The manifest of a directory; None where there is none. Raises FormatError naming it."""
    try:
        fields = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        files = {name: FileRecord(int(row["bytes"]), str(row["sha256"])) for name, row in fields["files"].items()}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise FormatError(f"{MANIFEST}: not a manifest ({error!r}); convert again") from None
    if fields.get("format") != FORMAT:
        raise FormatError(f"{MANIFEST}: format {fields.get('format')!r} found, {FORMAT} expected")
    return Manifest(fields, files)
