"""What KV caches depend on: two servers with the same fingerprint compute the same ones."""

import hashlib
import json
from pathlib import Path

import mlx.core as mx

from ... import __version__
from ...checkpoint.directory import read_config, weight_files
from ...checkpoint.manifest import MANIFEST
from ...config.model_args import ModelArgs


def fingerprint(directory: Path, args: ModelArgs, adapter: Path | None = None) -> str:
    """Hex digest of a model's weights (by the manifest's sums, else by size and time), config, window and adapter."""
    config = {name: value for name, value in read_config(directory).items() if name != "model_file"}
    digest = hashlib.sha256()
    described = {
        "version": __version__,
        "device": mx.default_device().type.name,
        "config": config,
        "window": args.window,
        "manifest": _sum(directory / MANIFEST),
        "files": [_file(path) for path in weight_files(directory)],
        "adapter": [(path.name, _sum(path)) for path in sorted(adapter.glob("adapter*"))] if adapter else None,
    }
    digest.update(json.dumps(described, sort_keys=True).encode())
    return digest.hexdigest()


def _file(path: Path) -> tuple:
    status = path.stat()
    # A copy of the directory has other times; its manifest vouches for the contents.
    has_manifest = (path.parent / MANIFEST).exists()
    return path.name, status.st_size, None if has_manifest else status.st_mtime_ns


def _sum(path: Path) -> str | None:
    if not path.is_file():
        return None
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
