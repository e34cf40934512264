"""The index of a directory: which file holds which tensor, checked before it is believed."""

import json
from pathlib import Path

from ..errors import FormatError

INDEX = "model.safetensors.index.json"


def read_index(directory: Path) -> dict[str, str] | None:
    """{tensor: file} from a directory's index; None where it has no index. Raises FormatError naming the index."""
    try:
        fields = json.loads((directory / INDEX).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise FormatError(f"{INDEX}: not an index of safetensors files ({error}); convert or fetch it again") from None
    return checked_weight_map(fields)


def checked_weight_map(fields: object) -> dict[str, str]:
    """{tensor: file} from the parsed JSON of an index.

    Each file must be a plain name, so that an index cannot point out of its directory. Raises FormatError.
    """
    weight_map = fields.get("weight_map") if isinstance(fields, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{INDEX}: not an index of safetensors files (no weight_map); convert or fetch it again")
    plain: set[str] = set()  # of the few files among the many tensors
    for name, file in weight_map.items():
        if isinstance(file, str) and file in plain:
            continue
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise FormatError(
                f"{INDEX}: not an index of safetensors files ({name} lies in {file!r}, a plain .safetensors name "
                "expected); convert or fetch it again"
            )
        plain.add(file)
    return weight_map
