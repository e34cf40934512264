"""A directory of weights: its config.json, and what kind of directory it is."""

import json
from dataclasses import dataclass
from pathlib import Path

from ..errors import FormatError


@dataclass(frozen=True)
class Directory:
    path: Path
    config: dict

    @property
    def is_fp8(self) -> bool:
        """A checkpoint as Hugging Face has it, which must be converted first."""
        quantization = self.config.get("quantization_config")
        return (
            "quantization" not in self.config
            and isinstance(quantization, dict)
            and quantization.get("quant_method") == "fp8"
        )


def read_config(path: Path) -> dict:
    """config.json of a directory. Raises FormatError naming it."""
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
