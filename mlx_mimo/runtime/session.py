"""What commands that generate do around it: raise the wired limit, report counters, end residency."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..planning import memory
from .loaded import loaded_of


def wired_limit(model: nn.Module, wanted: bool) -> AbstractContextManager:
    """Context manager that raises Metal's wired limit as mlx-lm does, if `wanted`. Written for Metal, not run there."""
    if not wanted:
        return nullcontext()
    from mlx_lm.generate import wired_limit as raised

    return raised(model)


def peak_memory_bytes() -> int:
    """The process's peak memory on a CPU, MLX's own count on a GPU."""
    if mx.default_device() != mx.Device(mx.cpu):
        return mx.get_peak_memory()
    return memory.peak_memory_bytes()


def experts_report(model: nn.Module) -> dict[str, Any] | None:
    """The counters of expert residency, or None where every expert is resident."""
    residency = loaded_of(model).residency
    if residency is None:
        return None
    counters = residency.counters
    return asdict(counters) | {"hit_rate": counters.hit_rate}


def end_residency(model: nn.Module, profile: str | None) -> None:
    """Saves the profile where `profile` names a file, and closes residency's files and threads."""
    residency = loaded_of(model).residency
    if residency is None:
        return
    try:
        if profile:
            residency.save_profile(profile)
    finally:
        residency.close()
