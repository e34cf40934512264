"""How the next token is chosen: the command's flags, else the model's generation_config.json, else greedy."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import TypedDict

import mlx.core as mx

Sampler = Callable[[mx.array], mx.array]  # logprobs (1, vocab_size) → tokens (1,)


class SamplingDefaults(TypedDict):
    temp: float  # 0 is greedy
    top_p: float  # share of probability to sample from; 0 is all
    top_k: int  # tokens to sample from; 0 is all


GREEDY = SamplingDefaults(temp=0.0, top_p=0.0, top_k=0)


def generation_defaults(directory: Path) -> SamplingDefaults:
    """What a directory's generation_config.json says; greedy where it says nothing, cannot be read or is missing."""
    try:
        config = json.loads((directory / "generation_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return GREEDY  # optional file: greedy is the documented default
    if not config.get("do_sample", "temperature" in config):
        return GREEDY
    return SamplingDefaults(
        temp=config.get("temperature", 1.0), top_p=config.get("top_p", 0.0), top_k=config.get("top_k", 0) or 0
    )


def sampler_for(args: argparse.Namespace, defaults: SamplingDefaults) -> Sampler:
    """mlx-lm's sampler with the values of the flags --temp, --top-p, --top-k and --min-p; a flag that was not given
    leaves the model's default."""
    from mlx_lm.sample_utils import make_sampler

    values = {"min_p": 0.0, **defaults}
    for name in values:
        if getattr(args, name, None) is not None:
            values[name] = getattr(args, name)
    return make_sampler(**values)
