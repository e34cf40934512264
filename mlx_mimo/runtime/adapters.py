"""LoRA adapters that mlx_lm.lora trained, put onto a loaded model."""

import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from ..errors import FormatError, MimoError, UsageError

CONFIG, WEIGHTS = "adapter_config.json", "adapters.safetensors"


def check_adapter(path: str | Path, residency: bool) -> None:
    """Checks an adapter before a model is loaded for it. `residency` says that experts are kept outside the model.
    Raises UsageError where `path` is no directory, FormatError where it holds no adapter, MimoError where the adapter
    is for experts that are kept outside."""
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
        names = mx.load(str(path / WEIGHTS))  # lazy: reads the header only, and takes what MLX wrote
    except RuntimeError as error:
        raise FormatError(f"{path / WEIGHTS}: {error}; train the adapter again") from error
    touched = next((name for name in [*names, *keys] if "switch_mlp" in name), None)
    if residency and touched is not None:
        raise MimoError(
            f"{path / WEIGHTS}: {touched} adapts experts, which lie outside the model here; train the adapter with "
            "lora_parameters.keys of attention alone, such as self_attn.q_proj"
        )


def put_adapter(model: nn.Module, path: str | Path) -> None:
    """Adds the adapter of a directory that `check_adapter` took to the model, in place. Raises FormatError where it
    was trained for another model."""
    from mlx_lm.tuner.utils import load_adapters

    try:
        load_adapters(model, str(path))  # changes the model and returns it
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FormatError(f"{path}: the adapter does not fit the model: {' '.join(str(error).split())}") from error
    model.eval()
