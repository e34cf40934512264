"""The checkpoint that a conversion reads: a Directory whose tensors are read by name, as NumPy arrays.

A tensor is found through the index alone; a weight and its scale may lie in different files.
"""

import os
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from mlx_mimo.checkpoint.directory import SINGLE, Directory, read_config
from mlx_mimo.checkpoint.header import TensorEntry
from mlx_mimo.checkpoint.index import INDEX, read_index
from mlx_mimo.errors import FormatError, MimoError, UsageError

NUMPY_DTYPES = {"F8_E4M3": "u1", "F8_E8M0": "u1", "U8": "u1", "BF16": "<u2", "F16": "<u2", "F32": "<f4", "U32": "<u4"}


class Source(Directory):
    """A local directory of safetensors. Several threads may read at once."""

    local = True  # whether many small reads cost little
    repo: str | None = None
    revision: str | None = None

    def __init__(self, directory: str | os.PathLike[str]):
        """Reads config.json and the index. Raises UsageError for no directory, FormatError for a wrong file."""
        path = Path(directory)
        if not path.is_dir():
            raise UsageError(f"{directory}: no such directory")
        config, weight_map = read_config(path), read_index(path)
        if weight_map is None and not (path / SINGLE).exists():
            raise FormatError(f"{INDEX}: no such file in {path}; is it a model's directory?")
        super().__init__(path, config, weight_map)

    def entry(self, name: str) -> TensorEntry:
        """Where a tensor lies. Raises FormatError where the index or its file does not have it."""
        if name not in self.weight_map:
            raise FormatError(f"{INDEX}: {name} is missing from the checkpoint")
        file = self.weight_map[name]
        entry = self.header(file).tensors.get(name)
        if entry is None:
            raise FormatError(f"{INDEX}: {name} should lie in {file}, which has no such tensor; fetch both again")
        return entry

    def read(self, name: str, begin: int = 0, end: int | None = None) -> np.ndarray:
        """Rows [begin, end) of a tensor, by default all; FP8 as uint8 codes, bfloat16 as uint16 bits.

        Raises FormatError naming the file.
        """
        entry = self.entry(name)
        if entry.dtype not in NUMPY_DTYPES:
            raise FormatError(f"{self.weight_map[name]}: {name}: dtype {entry.dtype} is not one the converter reads")
        rows = entry.shape[0] if entry.shape else 1
        end = rows if end is None else end
        row_bytes = entry.nbytes // max(rows, 1)
        data = self._pread(self.weight_map[name], entry.offset + begin * row_bytes, (end - begin) * row_bytes)
        return np.frombuffer(data, NUMPY_DTYPES[entry.dtype]).reshape(end - begin, *entry.shape[1:])

    def text(self, file: str) -> bytes | None:
        """The bytes of a small file, such as the tokenizer's; None where there is no such file."""
        path = self.path / file
        return path.read_bytes() if path.is_file() else None

    def identity(self, file: str) -> list[str | int]:
        """Values that change when the file does: a conversion stops where they differ from its beginning's."""
        try:
            stat = os.stat(self.path / file)
        except OSError as error:
            raise FormatError(f"{file}: cannot be read any more: {error.strerror}") from None
        return [stat.st_size, stat.st_mtime_ns]

    def need(self, files: Iterable[str], soon: Iterable[str] = ()) -> None:
        """Announces that `files` will be read now, and `soon` after them. Returns when `files` can be read."""

    def release(self, file: str) -> None:
        """Announces that nothing more will be read from this file."""

    def close(self) -> None:
        """Announces that nothing more will be read."""

    def staging_bytes(self, files: Iterable[str]) -> int:
        """Bytes that these files take on the target's disk while they are read."""
        return 0

    def _pread(self, file: str, offset: int, nbytes: int) -> bytes:
        try:
            with open(self.path / file, "rb", buffering=0) as handle:
                parts = []
                while nbytes:
                    part = os.pread(handle.fileno(), nbytes, offset)
                    if not part:
                        raise FormatError(f"{file}: ends at byte {offset:,}, {nbytes:,} more expected; cut short")
                    parts.append(part)
                    offset, nbytes = offset + len(part), nbytes - len(part)
        except OSError as error:
            raise FormatError(f"{file}: cannot be read: {error.strerror}") from error
        return parts[0] if len(parts) == 1 else b"".join(parts)


def is_repo(path_or_repo: str | os.PathLike[str]) -> bool:
    """Whether it is no directory here, and has the form of a Hub repository's name."""
    return not Path(path_or_repo).is_dir() and bool(re.fullmatch(r"[\w.-]+/[\w.-]+", str(path_or_repo)))


def open_source(path_or_repo: str | os.PathLike[str], revision: str | None = None, weights: bool = True) -> Source:
    """The Source of a local directory, or of a Hub repository after fetching it into the Hub's cache.

    Without `weights` only the small files are fetched: enough for config and index.
    Raises UsageError where it is neither, MimoError where it cannot be fetched.
    """
    if not is_repo(path_or_repo):
        return Source(path_or_repo)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "merges.txt", "*.jinja", *(["*.safetensors"] if weights else [])]
    try:
        directory = snapshot_download(str(path_or_repo), revision=revision, allow_patterns=patterns)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise MimoError(f"{path_or_repo}: no such directory, and the Hub does not give it: {reason}") from error
    source = Source(directory)
    source.repo, source.revision = str(path_or_repo), Path(directory).name
    return source
