"""What `load` knows of a model on this machine, as one object that the model carries: `model.loaded`."""

from dataclasses import dataclass, field

import mlx.nn as nn

from ..experts.residency import Residency
from ..models.mimo_v2_flash import Model
from ..planning.budget import CHUNK
from .sampling import GREEDY, SamplingDefaults


@dataclass
class Loaded:
    """How a model runs on this machine."""

    residency: Residency | None = None  # None where experts are stacked in the model itself, all of them in memory
    prefill_chunk: int = CHUNK  # prompt tokens of one forward pass that fit into memory
    synchronous: bool = False  # layers wait for the host (streamed experts, the CPU kernels): no forward runs ahead
    sampling: SamplingDefaults = field(default_factory=lambda: GREEDY)  # of the directory's generation_config.json


class LoadedModel(Model):
    """The model as `load` returns it. mlx_lm's functions take it like any other."""

    loaded: Loaded

    @property
    def residency(self) -> Residency | None:
        """The experts' residency: counters, resize, profiles, close. None where experts are stacked."""
        return loaded_of(self).residency


def loaded_of(model: nn.Module) -> Loaded:
    """`model.loaded`, or the defaults for a model that `load` did not make."""
    found = getattr(model, "loaded", None)
    return found if isinstance(found, Loaded) else Loaded()
