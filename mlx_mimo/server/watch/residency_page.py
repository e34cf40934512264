"""`/residency`: what expert residency does, live. The page is one file; this module feeds it."""

import base64
import time
from importlib.resources import files
from typing import Any

import numpy as np

from ..engine.worker import Worker

SECONDS = 1.0  # between two snapshots


def page() -> bytes:
    return files(__package__).joinpath("residency.html").read_bytes()


def snapshot(worker: Worker) -> dict[str, Any]:
    """The state at this moment, for JSON. Read beside the generation thread: a figure may be a step old."""
    loaded = worker.loaded
    residency = None if loaded is None else loaded.residency
    state: dict[str, Any] = {
        "time": time.time(),
        "model_ready": loaded is not None,
        "queued": worker.queued,
        "layers": [],
        "kv_bytes": worker.prompt_cache.nbytes + worker.running_kv_bytes,
    }
    if residency is None:
        return state
    counters = residency.counters
    state |= {
        "all_resident": residency.all_resident,
        "policy": counters.policy,
        "slots": counters.slots,
        "slot_bytes": counters.slot_bytes,
        "hits": counters.hits,
        "misses": counters.misses,
        "bytes_read": counters.bytes_read,
        "read_seconds": counters.read_seconds,
    }
    for pool in residency.pools:
        residents = pool.residents
        uses, slots = residents.uses, residents.slot_of
        for layer, base in residents.base.items():
            span = slice(base, base + pool.num_experts)
            state["layers"].append({"layer": layer, "uses": _shades(uses[span]), "resident": _packed(slots[span] >= 0)})
    state["layers"].sort(key=lambda row: row["layer"])
    return state


def _shades(uses: np.ndarray) -> str:
    """Use relative to the layer's most used expert, 0 to 255, in base64."""
    uses = np.asarray(uses, dtype=np.float64)
    most = uses.max(initial=0)
    return _packed(np.sqrt(uses / most) * 255 if most > 0 else uses)


def _packed(values: np.ndarray) -> str:
    return base64.b64encode(np.asarray(values).astype(np.uint8).tobytes()).decode()
