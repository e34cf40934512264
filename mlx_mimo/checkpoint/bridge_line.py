"""The line that `mlx_mimo bridge` adds to config.json. Sizes and hashes in the manifest are of the file without it."""

import hashlib
from pathlib import Path

FILE = "mlx_mimo_bridge.py"
# A whole line, so that removing it gives back the bytes that were written.
LINE = f'\n  "model_file": "{FILE}",'


def without(config: bytes) -> bytes:
    """The bytes of a config.json as they were before the bridge was turned on."""
    return config.replace(LINE.encode(), b"", 1)


def size(path: Path) -> int:
    """The size in bytes of a file of a converted directory, as the manifest counts it."""
    return len(without(path.read_bytes())) if path.name == "config.json" else path.stat().st_size


def sha256(path: Path) -> str:
    """The hexadecimal sha256 of a file of a converted directory, as the manifest has it."""
    if path.name == "config.json":
        return hashlib.sha256(without(path.read_bytes())).hexdigest()
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
