"""What `mlx_mimo bridge` adds to config.json: the bytes that were converted are the file without it."""

import hashlib
from pathlib import Path

FILE = "mlx_mimo_bridge.py"
# One line of its own, so that taking it out gives back the very bytes.
LINE = f'\n  "model_file": "{FILE}",'


def without(config: bytes) -> bytes:
    """A config.json as it was before the bridge was turned on."""
    return config.replace(LINE.encode(), b"", 1)


def size(path: Path) -> int:
    """Bytes of a converted directory's file, as the manifest counts them."""
    return len(without(path.read_bytes())) if path.name == "config.json" else path.stat().st_size


def sha256(path: Path) -> str:
    """Of a converted directory's file, as the manifest has it."""
    if path.name == "config.json":
        return hashlib.sha256(without(path.read_bytes())).hexdigest()
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
