"""Expert residency for a loaded model: `attach` replaces its experts and returns a `Residency`."""

import os
import threading
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..checkpoint.directory import Directory
from ..checkpoint.record import ExpertFile, RecordLayout
from ..errors import FormatError, MimoError
from .banks import host_writable, most_slots, slot_bytes
from .compute import ComputeFor, MLXCompute
from .layer import Lookahead, ResidentSwitchGLU, StreamedSwitchGLU
from .policy import DEFAULT_HALF_LIFE_TOKENS
from .pool import Counters, Pool, divide, group_by_shape
from .profile import Profile, fingerprint, load_profile, save_profile
from .reader import ExpertReader
from .trace import TraceWriter


class ResidencyWarning(UserWarning):
    """A condition that costs speed but no correctness: few slots, a profile that could not be used."""


def attach(
    model: nn.Module,
    directory: Directory | str | os.PathLike[str],
    *,
    expert_memory_bytes: int | None = None,
    slots: int | None = None,
    policy: str = "lfu",
    half_life_tokens: float = DEFAULT_HALF_LIFE_TOKENS,
    reader_threads: int = 8,
    lookahead: bool = False,
    hits_first: bool | None = None,
    in_place: bool | None = None,
    compute_for: ComputeFor = MLXCompute,
) -> "Residency":
    """Gives every MoE layer of `model` its experts from the expert files in `directory`.

    `expert_memory_bytes` bounds the memory of all slots together, or `slots` their number; with neither, or with enough
    for all, every expert is read now and stays. `hits_first` computes hits while misses are read; None does so on the
    CPU while reads wait for the disk, and never on a GPU, where computing in two pieces costs a wait for the device.
    `lookahead` reads ahead what the next layer's router would choose. `in_place` overrides the check whether the host
    can write into the device's arrays. `compute_for` chooses how the experts of a layout are computed.

    The caller must `close` the result. Raises FormatError when files and model do not belong together, MimoError when a
    file cannot be read.
    """
    directory = Directory.of(directory)
    files = directory.expert_files
    layers = _moe_layers(model)
    _check(directory.path, files, layers)
    hidden_size = model.args.hidden_size
    groups = group_by_shape(files)
    computes = [compute_for(next(iter(group.values())).layout, hidden_size) for group in groups]
    experts = [sum(file.num_experts for file in group.values()) for group in groups]
    sizes = [slot_bytes(_layout(group), compute.widen) for group, compute in zip(groups, computes)]
    total = sum(size * count for size, count in zip(sizes, experts))
    if slots is not None:
        expert_memory_bytes = total if slots >= sum(experts) else slots * total // sum(experts)
    in_place = host_writable() if in_place is None else in_place
    if hits_first is None and mx.default_device() != mx.Device(mx.cpu):
        hits_first = False
    reader = ExpertReader(files, reader_threads)
    modules: dict[int, nn.Module] = {}
    pools: list[Pool] = []
    try:
        if expert_memory_bytes is None or expert_memory_bytes >= total:
            for group, compute in zip(groups, computes):
                for layer, file in group.items():
                    modules[layer] = ResidentSwitchGLU(file, reader, compute, in_place)
        else:
            shares = [slots] if slots is not None and len(groups) == 1 else divide(expert_memory_bytes, sizes, experts)
            for group, compute, share in zip(groups, computes, shares):
                most = most_slots(_layout(group), compute.widen)
                share = min(share, most or share)
                pool = Pool(group, share, reader, policy, half_life_tokens, compute.widen, in_place)
                pools.append(pool)
                modules.update({layer: StreamedSwitchGLU(layer, pool, compute, hits_first) for layer in group})
    except BaseException:
        reader.close()
        raise
    for layer, module in modules.items():
        layers[layer].mlp.switch_mlp = module
    residency = Residency(
        files, modules, pools, reader, policy, model.args.num_experts_per_tok, sum(sizes) // len(sizes)
    )
    if pools:
        if lookahead:
            residency.look_ahead({layer: layers[layer].mlp.gate for layer in modules})
        residency.warn_if_short()
    return residency


class Residency:
    """The experts of one loaded model. Only the thread that runs the model may call it, except `request_resize`."""

    def __init__(
        self,
        files: dict[int, ExpertFile],
        modules: dict[int, nn.Module],
        pools: list[Pool],
        reader: ExpertReader,
        policy: str,
        top_k: int,
        mean_slot_bytes: int,
    ):
        self.files = files
        self.modules = dict(sorted(modules.items()))
        self.pools = pools
        self.reader = reader
        self.policy = policy
        self.top_k = top_k
        self._slot_bytes = mean_slot_bytes
        self._trace: TraceWriter | None = None
        self._wanted_bytes: int | None = None
        self._lock = threading.Lock()
        first = next(iter(self.modules.values()))
        if pools:
            first.before = self.apply_resize

    @property
    def all_resident(self) -> bool:
        return not self.pools

    @property
    def counters(self) -> Counters:
        """A copy of the counters of all pools together. `slot_bytes` is the mean where record shapes differ."""
        total = Counters(self.policy, bytes_read=self.reader.bytes_read, read_seconds=self.reader.seconds)
        if self.all_resident:
            slots = sum(file.num_experts for file in self.files.values())
            return replace(total, slots=slots, slot_bytes=self._slot_bytes)
        for pool in self.pools:
            total.slots += pool.slots
            total.slot_bytes += pool.slots * pool.banks.slot_bytes
            for name in ("hits", "misses", "evictions"):
                setattr(total, name, getattr(total, name) + getattr(pool.residents, name))
            for name in ("preloaded", "lookahead_reads", "lookahead_used"):
                setattr(total, name, getattr(total, name) + getattr(pool, name))
        total.slot_bytes //= total.slots
        return total

    @property
    def demand_slots(self) -> int:
        """The slots that one token needs, in all layers together."""
        return len(self.files) * self.top_k

    def warn_if_short(self) -> None:
        """Warns where the slots hold less than one token's experts, and names the memory that would hold them."""
        counters = self.counters
        if counters.slots < self.demand_slots:
            need = self.demand_slots * counters.slot_bytes
            warnings.warn(
                f"expert memory of {_size(counters.slots * counters.slot_bytes)} holds {counters.slots} experts; "
                f"one token needs {self.demand_slots}. It works, but reads nearly all of them "
                f"for each token: give --expert-memory {_size(need)} or more",
                ResidencyWarning,
                stacklevel=3,
            )

    def look_ahead(self, routers: dict[int, Callable[[mx.array], tuple[mx.array, mx.array]]]) -> None:
        """Turns look-ahead on; `routers` maps each MoE layer to its router."""
        layers = list(self.modules)
        for layer, following in pairwise(layers):
            self.modules[layer].ahead = Lookahead(following, self.modules[following].pool, routers[following])

    def resize(self, expert_memory_bytes: int | None = None, slots: int | None = None) -> None:
        """Changes the budget, between tokens: to a number of bytes, or of slots. Experts of highest score stay.

        The peak of memory is all slots and a second copy of the largest bank. Raises MimoError where all experts are
        resident; MemoryError or RuntimeError, as MLX does, where memory cannot be had, and the budget stays.
        """
        self._check_resizable()
        short = self.counters.slots < self.demand_slots
        sizes = [pool.banks.slot_bytes for pool in self.pools]
        experts = [len(pool.files) * pool.num_experts for pool in self.pools]
        if expert_memory_bytes is None:
            if slots is None:
                raise ValueError("a number of bytes or of slots expected")
            expert_memory_bytes = slots * sum(s * n for s, n in zip(sizes, experts)) // sum(experts)
        shares = divide(expert_memory_bytes, sizes, experts)
        if slots is not None and len(self.pools) == 1:
            shares = [min(slots, experts[0])]
        shrinking = sorted(zip(self.pools, shares), key=lambda row: row[1] - row[0].slots)
        for pool, share in shrinking:
            pool.resize(min(share, most_slots(pool.layout, pool.banks.widen) or share))
        mx.clear_cache()  # gives memory that MLX keeps back to the system
        if not short:
            self.warn_if_short()

    def _check_resizable(self) -> None:
        if self.all_resident:
            raise MimoError("all experts are resident and stay so; load the model with --expert-memory to resize")

    def request_resize(self, expert_memory_bytes: int) -> None:
        """Asks for a `resize` before the next token; may be called from any thread. Raises MimoError as `resize`."""
        self._check_resizable()
        with self._lock:
            self._wanted_bytes = expert_memory_bytes

    def apply_resize(self) -> None:
        """Does what `request_resize` asked for; called before each token. Warns where memory cannot be had."""
        if self._wanted_bytes is None:
            return
        with self._lock:
            wanted, self._wanted_bytes = self._wanted_bytes, None
        try:
            self.resize(wanted)
        except (MemoryError, RuntimeError) as error:  # MLX raises the latter where memory cannot be had
            counters = self.counters
            kept = _size(counters.slots * counters.slot_bytes)
            warnings.warn(f"experts keep {kept}, {_size(wanted)} wanted: {error}", ResidencyWarning, stacklevel=2)

    @cached_property
    def fingerprint(self) -> str:
        """The model's, as in profiles and traces."""
        return fingerprint(self.files)

    def save_profile(self, path: str | os.PathLike[str]) -> None:
        """Writes how often each expert was used, in a loaded profile too; warns where all are resident."""
        if self.all_resident:
            warnings.warn(f"{path}: no profile is written: every expert is resident", ResidencyWarning, stacklevel=2)
            return
        uses = {}
        for pool in self.pools:
            for layer, base in pool.residents.base.items():
                uses[layer] = pool.residents.uses[base : base + pool.num_experts]
        save_profile(path, Profile(self.fingerprint, self.pools[0].residents.tokens, dict(sorted(uses.items()))))

    def load_profile(self, path: str | os.PathLike[str], progress: Callable[[int, int], None] | None = None) -> int:
        """Reads the most used experts of a profile, as many as fit. Returns how many were read.

        Warns about a profile of another model or a damaged one, and returns 0. Calls `progress(done, wanted)` as
        experts arrive. A KeyboardInterrupt ends the reading and is not raised.
        """
        if self.all_resident:
            return 0
        try:
            profile = load_profile(path, self.fingerprint, self.files)
        except MimoError as error:
            warnings.warn(f"{error}; starting without it", ResidencyWarning, stacklevel=2)
            return 0
        done = 0
        for pool in self.pools:
            pool.residents.seed(np.concatenate([profile.uses[layer] for layer in pool.files]), profile.tokens)
            done += pool.preload(progress)
        return done

    def trace_to(self, path: str | os.PathLike[str]) -> None:
        """Records routing into a file from now on, until `close` or another `trace_to`."""
        experts = max(file.num_experts for file in self.files.values())
        self._end_trace()
        self._trace = TraceWriter(path, list(self.files), experts, self.top_k, self.fingerprint, self._slot_bytes)
        for module in self.modules.values():
            module.trace = self._trace

    def close(self) -> None:
        """Ends the trace and closes the reader; the model cannot read experts any more.

        Raises MimoError where the trace could not be written to the end.
        """
        try:
            self._end_trace()
        finally:
            self.reader.close()

    def _end_trace(self) -> None:
        if self._trace is not None:
            for module in self.modules.values():
                module.trace = None
            trace, self._trace = self._trace, None
            trace.close()


def _layout(group: dict[int, ExpertFile]) -> RecordLayout:
    return next(iter(group.values())).layout


def _moe_layers(model: nn.Module) -> dict[int, nn.Module]:
    """{number: decoder layer} of the layers with experts."""
    return {i: layer for i, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "switch_mlp")}


def _check(directory: Path, files: dict[int, ExpertFile], layers: dict[int, nn.Module]) -> None:
    if set(files) != set(layers):
        missing, extra = sorted(set(layers) - set(files)), sorted(set(files) - set(layers))
        found = (
            f"no expert file for layers {missing}" if missing else f"expert files for layers {extra}, not MoE layers"
        )
        raise FormatError(f"{directory.name}: {found}; run the same mlx_mimo convert again to mend it")
    for layer, file in files.items():
        router = getattr(layers[layer].mlp, "gate", None)
        weight = getattr(router, "weight", None)
        if isinstance(weight, mx.array) and weight.shape[0] != file.num_experts:
            raise FormatError(f"{file.path.name}: {file.num_experts} experts, the router chooses of {weight.shape[0]}")


def _size(nbytes: int) -> str:
    """A size as --expert-memory takes it, rounded up."""
    for unit, size in (("GB", 10**9), ("MB", 10**6)):
        if nbytes >= size:
            return f"{-(-nbytes * 10 // size) / 10:g}{unit}"
    return str(nbytes)
