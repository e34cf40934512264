"""How the next token is chosen: the command's flags, else the model's generation_config.json, else greedy."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path


def generation_defaults(directory: Path) -> dict[str, float]:
    """{temp, top_p, top_k} of a directory's generation_config.json; temp 0 is greedy."""
    try:
        config = json.loads((directory / "generation_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {"temp": 0.0, "top_p": 0.0, "top_k": 0}  # optional file: greedy is the documented default
    if not config.get("do_sample", "temperature" in config):
        return {"temp": 0.0, "top_p": 0.0, "top_k": 0}
    return {
        "temp": config.get("temperature", 1.0),
        "top_p": config.get("top_p", 0.0),
        "top_k": config.get("top_k", 0) or 0,
    }


def sampler_for(model, args: argparse.Namespace) -> Callable:
    """mlx-lm's sampler with the flags' values over the model's own."""
    from mlx_lm.sample_utils import make_sampler

    chosen = dict(getattr(model, "generation_defaults", None) or {"temp": 0.0, "top_p": 0.0, "top_k": 0})
    for name in ("temp", "top_p", "top_k", "min_p"):
        if getattr(args, name, None) is not None:
            chosen[name] = getattr(args, name)
    return make_sampler(
        temp=chosen["temp"], top_p=chosen["top_p"], top_k=chosen["top_k"], min_p=chosen.get("min_p", 0.0)
    )
