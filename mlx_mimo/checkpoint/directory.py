"""A directory of weights: what lies in it, what kind of directory it is, and what is wrong with its files."""

import json
import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import FormatError
from . import bridge_line
from .header import Header, read_header
from .index import INDEX, read_index
from .manifest import Manifest, read_manifest
from .record import ExpertFile, expert_files

WEIGHTS = "model*.safetensors"  # what mlx-lm loads of a directory
SINGLE = "model.safetensors"  # the one file of a checkpoint without an index
MTP_FILE = "model-mtp.safetensors"  # multi-token prediction, which nothing loads yet


class Directory:
    """The files of one model directory. Nothing is read before it is asked for, and each header is read once.

    A Directory keeps what it has read: make another one after files have changed. Whatever reads a file raises
    FormatError, which begins with the file's name.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        config: dict[str, Any] | None = None,
        weight_map: dict[str, str] | None = None,
    ):
        """`config` and `weight_map`, where they are known already, are taken instead of the directory's files."""
        self.path = Path(path)
        self._config = config
        self._weight_map = weight_map
        self._headers: dict[str, Header] = {}

    @classmethod
    def of(cls, directory: "Directory | str | os.PathLike[str]") -> "Directory":
        """The Directory itself, or a new one for a path."""
        return directory if isinstance(directory, Directory) else cls(directory)

    # What lies in it

    @property
    def config(self) -> dict[str, Any]:
        """The fields of config.json."""
        if self._config is None:
            self._config = read_config(self.path)
        return self._config

    @property
    def weight_files(self) -> list[Path]:
        """The safetensors files that mlx-lm would load, whether an index names them or not."""
        return weight_files(self.path)

    @cached_property
    def has_index(self) -> bool:
        return (self.path / INDEX).exists()

    @property
    def weight_map(self) -> dict[str, str]:
        """{tensor: file}: what the index says; without an index, what the files hold."""
        if self._weight_map is None:
            self._weight_map = read_index(self.path)
        if self._weight_map is None:
            self._weight_map = {
                name: path.name for path in self.weight_files for name in self.header(path.name).tensors
            }
        return self._weight_map

    @property
    def files(self) -> list[str]:
        """The names of the files that hold the tensors of `weight_map`."""
        return sorted(set(self.weight_map.values()))

    def header(self, file: str) -> Header:
        """The checked header of a file, by the file's name."""
        if file not in self._headers:
            self._headers[file] = self._read_header(file)
        return self._headers[file]

    def forget_headers(self) -> None:
        """Frees the memory of the headers, a few hundred bytes a tensor. One that is asked for again is read again."""
        self._headers.clear()

    def _read_header(self, file: str) -> Header:
        return read_header(self.path / file)

    @cached_property
    def expert_files(self) -> dict[int, ExpertFile]:
        """{layer: ExpertFile}, each checked against the format of records; empty where experts are stacked."""
        return expert_files(self.path, self.header)

    @cached_property
    def manifest(self) -> Manifest | None:
        """What the conversion wrote down; None in a directory that mlx_mimo did not convert."""
        return read_manifest(self.path)

    # What kind of directory it is

    @property
    def is_fp8(self) -> bool:
        """Whether it is a checkpoint as Hugging Face has it, which must be converted first."""
        quantization = self.config.get("quantization_config")
        return (
            "quantization" not in self.config
            and isinstance(quantization, dict)
            and quantization.get("quant_method") == "fp8"
        )

    @property
    def is_streamable(self) -> bool:
        """Whether one expert can be read alone. Stacked experts must all be in memory."""
        return bool(self.expert_files)

    # What is wrong with it

    def check(self) -> None:
        """Raises FormatError with the first of `problems`, if there is any."""
        for problem in self.problems():
            raise FormatError(problem)

    def problems(self) -> Iterator[str]:
        """What keeps its weights from being loaded, one line each, beginning with a file's name: an index that is not
        one, a file that is missing or not whole, a tensor that is not where the index says it is.
        """
        if self._weight_map is None and not self.has_index and not self.weight_files:
            yield f"{self.path}: no {WEIGHTS}; a converted directory expected"
            return
        wanted: dict[str, set[str]] = {}
        try:
            for name, file in self.weight_map.items():
                wanted.setdefault(file, set()).add(name)
        except FormatError as error:
            yield str(error)
            return
        for file, names in sorted(wanted.items()):
            try:
                absent = names - self.header(file).tensors.keys()
            except FormatError as error:
                yield str(error)
                continue
            if absent:
                yield f"{file}: {min(absent)} is missing, {INDEX} expects it here; convert or fetch it again"

    def manifest_problems(self, deep: bool) -> Iterator[str]:
        """The files that are not as the manifest says, one line each: their sizes, and with `deep` every byte.

        Yields nothing where there is no manifest.
        """
        try:
            manifest = self.manifest
        except FormatError as error:
            yield str(error)
            return
        for name, wanted in (manifest.files if manifest else {}).items():
            path = self.path / name
            try:
                found = bridge_line.size(path)
                if found != wanted.nbytes:
                    yield f"{name}: {wanted.nbytes:,} bytes expected, {found:,} found; convert again"
                elif deep and bridge_line.sha256(path) != wanted.sha256:
                    yield f"{name}: its bytes are not those that were written (sha256); convert again"
            except FileNotFoundError:
                yield f"{name}: missing"
            except OSError as error:
                yield f"{name}: cannot be read: {error.strerror or error}"


def weight_files(directory: str | os.PathLike[str]) -> list[Path]:
    """The safetensors files of a directory that mlx-lm would load, by name."""
    return sorted(Path(directory).glob(WEIGHTS))


def read_config(path: Path) -> dict[str, Any]:
    """The fields of a directory's config.json. Raises FormatError naming it."""
    file = path / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FormatError(f"config.json: not found in {path}; a model directory expected") from None
    except (OSError, ValueError) as error:
        raise FormatError(f"config.json: cannot be read ({error}); convert or fetch {path} again") from None
    if not isinstance(config, dict):
        raise FormatError(f"config.json: a JSON object expected in {path}")
    return config
