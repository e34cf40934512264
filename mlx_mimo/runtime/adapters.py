"""LoRA adapters that mlx_lm.lora trained, put onto a loaded model."""

import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from ..errors import FormatError, MimoError, UsageError

CONFIG, WEIGHTS = "adapter_config.json", "adapters.safetensors"


def check_adapter(path: str | Path, residency: bool) -> None:
    """Raises UsageError, FormatError or MimoError where `path` holds no adapter, or one that touches experts while
    `residency` keeps these outside the model."""
    path = Path(path)
    if not path.is_dir():
        raise UsageError(f"--adapter-path: {path}: no such directory")
    for file in (CONFIG, WEIGHTS):
        if not (path / file).exists():
            raise FormatError(f"{path / file} is missing; a directory expected that mlx_lm.lora wrote")
    try:
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        lora = config["lora_parameters"] if config.get("fine_tune_type", "lora") != "full" else None
        keys = (lora or {}).get("keys") or ()
    except (ValueError, KeyError, AttributeError) as error:
        raise FormatError(f"{path / CONFIG}: not a configuration that mlx_lm.lora wrote ({error!r})") from None
    try:
        names = mx.load(str(path / WEIGHTS))  # lazily: the header alone; MLX's own headers are laxer than ours
    except RuntimeError as error:
        raise FormatError(f"{path / WEIGHTS}: {error}; train the adapter again") from error
    touched = next((name for name in [*names, *keys] if "switch_mlp" in name), None)
    if residency and touched is not None:
        raise MimoError(
            f"{path / WEIGHTS}: {touched} adapts experts, which lie outside the model here; train the adapter with "
            "lora_parameters.keys of attention alone, such as self_attn.q_proj"
        )


def put_adapter(model: nn.Module, path: str | Path) -> None:
    """Puts the adapter of a checked directory onto the model. Raises FormatError where it is another model's."""
    from mlx_lm.tuner.utils import load_adapters

    try:
        load_adapters(model, str(path))  # changes the model and returns it
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FormatError(f"{path}: the adapter does not fit the model: {' '.join(str(error).split())}") from error
    model.eval()
