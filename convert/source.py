"""The checkpoint that is read: config, index, checked headers, and tensors by name.

Tensors are found through the index alone; a weight and its scale may lie in different files.
"""

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from mlx_mimo.checkpoint.header import Header, TensorEntry, read_header
from mlx_mimo.errors import FormatError, MimoError, UsageError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
NUMPY_DTYPES = {"F8_E4M3": "u1", "F8_E8M0": "u1", "U8": "u1", "BF16": "<u2", "F16": "<u2", "F32": "<f4", "U32": "<u4"}


def read_json(path: Path) -> dict:
    """A JSON object from a file. Raises FormatError naming it."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FormatError(f"{path.name}: no such file in {path.parent}; is it a model's directory?") from None
    except (OSError, ValueError) as error:
        raise FormatError(f"{path.name}: not readable as JSON ({error}); fetch it again") from None
    if not isinstance(fields, dict):
        raise FormatError(f"{path.name}: a JSON object expected, {type(fields).__name__} found")
    return fields


def weight_map_of(fields: dict) -> dict[str, str]:
    """{tensor: file} of an index. File names must be plain: an index cannot point out of its directory."""
    weight_map = fields.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{INDEX}: no weight_map; fetch it again")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise FormatError(f"{INDEX}: {name}: file {file!r} is not a plain .safetensors name")
    return weight_map


class Source:
    """A local directory of safetensors. Reading is safe from several threads at once."""

    local = True  # whether many small reads cost little
    repo: str | None = None
    revision: str | None = None

    def __init__(self, directory: str | os.PathLike):
        self.directory = Path(directory)
        if not self.directory.is_dir():
            raise UsageError(f"{directory}: no such directory")
        self.config = read_json(self.directory / "config.json")
        if (self.directory / INDEX).exists() or not (self.directory / SINGLE).exists():
            self.weight_map = weight_map_of(read_json(self.directory / INDEX))
        else:
            self.weight_map = dict.fromkeys(self._read_header(SINGLE).tensors, SINGLE)
        self._headers: dict[str, Header] = {}

    @property
    def files(self) -> list[str]:
        return sorted(set(self.weight_map.values()))

    def header(self, file: str) -> Header:
        if file not in self._headers:
            self._headers[file] = self._read_header(file)
        return self._headers[file]

    def check_files(self) -> None:
        """Every file the index names is whole, and holds the tensors that the index says it holds."""
        for file in self.files:
            self.header(file)
        for name, file in self.weight_map.items():
            if name not in self.header(file).tensors:
                raise FormatError(f"{INDEX}: {name} should lie in {file}, which has no such tensor; fetch both again")

    def entry(self, name: str) -> TensorEntry:
        if name not in self.weight_map:
            raise FormatError(f"{INDEX}: {name} is missing from the checkpoint")
        file = self.weight_map[name]
        entry = self.header(file).tensors.get(name)
        if entry is None:
            raise FormatError(f"{INDEX}: {name} should lie in {file}, which has no such tensor; fetch both again")
        return entry

    def read(self, name: str, begin: int = 0, end: int | None = None) -> np.ndarray:
        """Rows [begin, end) of a tensor, all by default; FP8 comes as uint8 codes, bfloat16 as its uint16 bits."""
        entry = self.entry(name)
        if entry.dtype not in NUMPY_DTYPES:
            raise FormatError(f"{self.weight_map[name]}: {name}: dtype {entry.dtype} is not one the converter reads")
        rows = entry.shape[0] if entry.shape else 1
        end = rows if end is None else end
        row_bytes = entry.nbytes // max(rows, 1)
        data = self._pread(self.weight_map[name], entry.offset + begin * row_bytes, (end - begin) * row_bytes)
        return np.frombuffer(data, NUMPY_DTYPES[entry.dtype]).reshape(end - begin, *entry.shape[1:])

    def text(self, file: str) -> bytes | None:
        """A small file's bytes, such as the tokenizer's; None where there is none."""
        path = self.directory / file
        return path.read_bytes() if path.is_file() else None

    def identity(self, file: str) -> list:
        """What must stay as it is while a conversion is under way."""
        try:
            stat = os.stat(self.directory / file)
        except OSError as error:
            raise FormatError(f"{file}: cannot be read any more: {error.strerror}") from None
        return [stat.st_size, stat.st_mtime_ns]

    def need(self, files: Iterable[str], soon: Iterable[str] = ()) -> None:
        """These files will be read from now on, and `soon` after them."""

    def release(self, file: str) -> None:
        """Nothing more will be read from this file."""

    def close(self) -> None:
        """Nothing more will be read at all."""

    def staging_bytes(self, files: Iterable[str]) -> int:
        """Disk that these files take while they are needed, beside the output."""
        return 0

    def _read_header(self, file: str) -> Header:
        return read_header(self.directory / file)

    def _pread(self, file: str, offset: int, nbytes: int) -> bytes:
        try:
            with open(self.directory / file, "rb", buffering=0) as handle:
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


def is_repo(path_or_repo: str | os.PathLike) -> bool:
    return not Path(path_or_repo).is_dir() and bool(re.fullmatch(r"[\w.-]+/[\w.-]+", str(path_or_repo)))


def open_source(path_or_repo: str | os.PathLike, revision: str | None = None, weights: bool = True) -> Source:
    """A local directory, or a Hub repository fetched into the Hub's cache, with its weights or without.

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
