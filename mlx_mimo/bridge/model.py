"""The classes that a directory's bridge file gives to mlx-lm's loader, which then builds our model with residency.

mlx-lm imports the file that config.json names as `model_file`, takes `Model` and `ModelArgs` from it and loads the
weights as for any model. Two methods bring in residency: `sanitize` leaves the experts out, and `load_weights` attaches
residency in their place.
"""

import atexit
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from mlx_lm.models.cache import KVCache, RotatingKVCache
from mlx_lm.models.switch_layers import SwitchGLU

from ..checkpoint.directory import Directory
from ..checkpoint.record import PROJECTIONS, ExpertFile
from ..config.model_args import ModelArgs
from ..device import check as check_device
from ..errors import MimoError, UsageError
from ..experts.banks import slot_bytes
from ..experts.residency import attach
from ..models.mimo_v2_flash import Model
from ..planning.memory import available_memory
from ..runtime.compute import choose_compute
from ..runtime.load import (
    ExpertsElsewhere,
    TrunkModel,
    cache_limit,
    check_reader_threads,
    expert_limit,
    is_synchronous,
    on_cpu,
    working_set,
)
from ..runtime.loaded import Loaded, LoadedModel
from ..runtime.sampling import generation_defaults
from ..units import parse_size

PREFIX = "MLX_MIMO_"


def _memory(text: str) -> str | int:
    return text if text in ("auto", "all") else parse_size(text)


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        raise UsageError(f"a whole number of at least 1 expected, {text!r} found")
    return int(text)


def _policy(text: str) -> str:
    if text not in ("lfu", "lru"):
        raise UsageError(f"lfu or lru expected, {text!r} found")
    return text


def _switch(text: str) -> bool:
    if text not in ("0", "1"):
        raise UsageError(f"0 or 1 expected, {text!r} found")
    return text == "1"


# field of Settings: (how its text is read, what it does)
VARIABLES: dict[str, tuple[Callable[[str], object], str]] = {
    "expert_memory": (_memory, "bytes for experts, such as 24GB; auto (default) or all"),
    "expert_policy": (_policy, "who leaves: lfu (default) or lru"),
    "sliding_window": (_count, "keys a query sees in sliding layers, itself included"),
    "profile": (Path, "file of usage counts: loaded at the start, saved at the end"),
    "trace": (Path, "file into which the router's choices are recorded"),
    "lookahead": (_switch, "1 reads the next layer's likely experts ahead"),
    "threads": (_count, "CPU threads"),
    "reader_threads": (lambda text: check_reader_threads(_count(text)), "experts read at a time, 1 to 64 (default 8)"),
}


@dataclass(frozen=True)
class Settings:
    """Settings from environment variables: MLX_MIMO_EXPERT_MEMORY sets `expert_memory`, and so on."""

    expert_memory: str | int = "auto"
    expert_policy: str = "lfu"
    sliding_window: int | None = None
    profile: Path | None = None
    trace: Path | None = None
    lookahead: bool = False
    threads: int | None = None
    reader_threads: int = 8

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "Settings":
        """Reads all variables; an empty one counts as unset. Raises UsageError that names the variable."""
        values: dict[str, Any] = {}
        for field, (read, _) in VARIABLES.items():
            text = environment.get(PREFIX + field.upper(), "")
            try:
                if text:
                    values[field] = read(text)
            except UsageError as error:
                raise UsageError(f"{PREFIX}{field.upper()}: {error}") from None
        return cls(**values)


def classes(directory: Path, settings: Settings | None = None) -> tuple[type[nn.Module], type]:
    """Returns (Model, ModelArgs) for mlx-lm's loader, bound to `directory` and `settings` (default: the environment's).
    Raises UsageError for a wrong variable, and MimoError for one that needs residency where experts are stacked."""
    check_device()
    chosen = settings or Settings.from_environment()
    files = Directory(directory)

    class BridgedArgs:
        """In place of ModelArgs, of which mlx-lm calls `from_dict` only."""

        @staticmethod
        def from_dict(config: dict) -> ModelArgs:
            window = {} if chosen.sliding_window is None else {"window_keys": chosen.sliding_window}
            return ModelArgs.from_dict(config | window)

    streamed = files.is_streamable
    for field in () if streamed else ("expert_memory", "profile", "trace"):
        if isinstance(getattr(chosen, field), int | Path):
            raise MimoError(
                f"{PREFIX}{field.upper()}: {directory} has stacked experts; run mlx_mimo convert repack on it"
            )

    base: Any = _WithResidency if streamed else _Whole  # mypy wants one class here

    class BridgedModel(base):
        def __init__(self, args: ModelArgs):
            super().__init__(args, files, chosen)

    return BridgedModel, BridgedArgs


if TYPE_CHECKING:
    _Base = LoadedModel  # what both classes that take the mixin are
else:
    _Base = object


class _Bridged(_Base):
    """What both kinds of bridged model share: a mixin, to be named before the model's class."""

    def __init__(self, args: ModelArgs, directory: Directory, settings: Settings):
        super().__init__(args)
        self._directory, self._settings = directory, settings
        self._ready = False

    def load_weights(self, file_or_weights, strict: bool = True) -> nn.Module:
        super().load_weights(file_or_weights, strict)
        if not self._ready:  # later calls bring adapters
            self._ready = True
            self._prepare()
        return self

    def make_cache(self) -> list:
        """Returns mlx-lm's own caches: its commands save them, and read them back before any model is loaded."""
        args = self.args
        layers = range(args.num_hidden_layers)
        return [RotatingKVCache(max_size=args.window) if args.is_sliding(i) else KVCache() for i in layers]

    def _prepare(self) -> None:
        """Prepares the process and the weights, which have just been loaded, for the device."""
        mx.set_cache_limit(cache_limit())
        if self._settings.threads is not None:
            from ..cpu import set_threads

            set_threads(self._settings.threads)
        if on_cpu():
            # There mx.compile runs a C++ compiler for each fused kernel, dozens of times for a first training step.
            mx.disable_compile()
            # MLX's CPU backend accumulates in the activations' type, and is slow in 16 bits.
            self.update(tree_map(_float32, self.parameters()))
        mx.eval(self.parameters())

    def update_modules(self, modules: dict, strict: bool = True) -> nn.Module:
        """mlx_lm.fuse calls this with the fused modules and then saves the model, in the types of its directory."""
        super().update_modules(modules, strict)
        if self._ready and not any(hasattr(module, "fuse") for _, module in self.named_modules()):
            self._fused()
        return self

    def _fused(self) -> None:
        """Casts weights that were widened for a CPU back to the types in which they are stored."""
        stored: dict[str, mx.Dtype] = {}
        for file in self._directory.weight_files:
            if not file.name.startswith("model-experts-"):
                stored |= {name: value.dtype for name, value in _read(file).items()}
        narrowed = []
        for name, value in _arrays(self):
            kind = stored.get(name, mx.float32)
            if kind == mx.uint32:  # it was quantised on disk and was dequantised since (--dequantize)
                kind = stored[name.removesuffix(".weight") + ".scales"]
            if value.dtype == mx.float32 and kind in (mx.bfloat16, mx.float16):
                narrowed.append((name, value.astype(kind)))
        self.update(tree_unflatten(narrowed))


class _Whole(_Bridged, LoadedModel):
    """Our model of a directory with stacked experts, all of them in memory."""


class ExpertsKeptOutsideTheModel(nn.Module):
    """A placeholder under a projection's name, in layers whose experts our residency keeps.

    mlx-lm ignores an adapter's key that names no module; with this one it raises an error that shows the class's name.
    """


class _WithResidency(_Bridged, TrunkModel):
    """Our model that takes its experts from the directory's expert files once its other weights are there."""

    def __init__(self, args: ModelArgs, directory: Directory, settings: Settings):
        super().__init__(args, directory, settings)
        self.loaded = Loaded()

    def _prepare(self) -> None:
        super()._prepare()
        settings = self._settings
        directory, memory = self._directory, settings.expert_memory
        # mlx-lm's commands choose the chunks of a prompt themselves: 2048 tokens by default.
        found = expert_limit(directory, self.args, memory, kernels=False, fixed_chunk=True)
        residency = attach(
            self,
            directory,
            expert_memory_bytes=None if memory == "all" else found.expert_bytes,
            policy=settings.expert_policy,
            compute_for=choose_compute,
            reader_threads=settings.reader_threads,
            lookahead=settings.lookahead,
        )
        directory.forget_headers()
        for layer, file in self._directory.expert_files.items():
            experts = self.layers[layer].mlp.switch_mlp
            for projection in PROJECTIONS:
                experts[projection] = ExpertsKeptOutsideTheModel()
            experts.fuse = partial(self._fuse, layer, file)
        self.loaded = Loaded(
            residency=residency,
            prefill_chunk=found.chunk,
            synchronous=is_synchronous(residency),
            sampling=generation_defaults(self._directory.path),
        )
        if settings.trace is not None:
            residency.trace_to(settings.trace)
        if settings.profile is not None and settings.profile.exists():
            residency.load_profile(settings.profile)
        # mlx-lm's commands do not tell the model when they end.
        atexit.register(self._at_exit)

    def _at_exit(self) -> None:
        try:
            self._end_residency()
        except MimoError as error:
            print(f"mlx_mimo: error: {error}", file=sys.stderr)

    def _end_residency(self) -> None:
        residency, self.loaded.residency = self.loaded.residency, None
        if residency is None:
            return
        try:
            if self._settings.profile is not None:
                residency.save_profile(self._settings.profile)
        finally:
            residency.close()

    def train(self, mode: bool = True) -> nn.Module:
        """Replaces streamed experts by mlx-lm's own modules, all in memory, when training begins.

        Streamed experts and the CPU kernels compute in NumPy and in slots that change, so gradients through them would
        be wrong or zero. Residency ends here; evaluations between training steps use the whole experts, too. Raises
        MimoError where the experts do not fit into memory.
        """
        if mode and self.residency is not None:
            self._check_memory("training")
            self._end_residency()
            for layer in self.args.moe_layers:
                self.layers[layer].mlp.switch_mlp = ExpertsElsewhere()  # frees the slots before anything is read
            mx.clear_cache()
            for layer, file in self._directory.expert_files.items():
                whole = self._whole_experts(layer, file)
                if on_cpu():
                    whole.update(tree_map(_float32, whole.parameters()))
                mx.eval(whole.parameters())
                self.layers[layer].mlp.switch_mlp = whole
            self.loaded.synchronous = is_synchronous(None)
        return super().train(mode)

    def _fuse(self, layer: int, file: ExpertFile, dequantize: bool = False) -> nn.Module:
        """The module of a layer's experts that mlx_lm.fuse saves; they are read when it writes them."""
        self._check_memory("mlx_lm.fuse")
        return self._whole_experts(layer, file)  # dequantised by mlx-lm itself, which does so for every module

    def _fused(self) -> None:
        self._end_residency()
        super()._fused()

    def _check_memory(self, what: str) -> None:
        """Raises MimoError where the experts do not fit into the free memory and the slots' own."""
        held = self.residency.counters if self.residency is not None else None
        slots = held.slots * held.slot_bytes if held is not None else 0
        trunk = sum(value.nbytes for _, value in _arrays(self))
        # Metal's limit is for the whole process, so what the process holds already counts on both sides.
        free = available_memory(working_set(), trunk + slots) - trunk
        # Whole experts are MLX's own modules, which a CPU computes in float32.
        files = self._directory.expert_files.values()
        needed = sum(file.num_experts * slot_bytes(file.layout, widen=on_cpu()) for file in files)
        if needed > free:
            raise MimoError(
                f"{what} needs all experts in memory, {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free; "
                "take a larger machine, or a checkpoint of fewer bits"
            )

    def _whole_experts(self, layer: int, file: ExpertFile) -> nn.Module:
        """mlx-lm's module of one layer's experts as they are stored: lazy arrays, frozen."""
        args, quantization = self.args, self._directory.config["quantization"]
        prefix = f"model.layers.{layer}.mlp.switch_mlp."
        default = {key: quantization[key] for key in ("group_size", "bits", "mode") if key in quantization}
        stacked = Model.sanitize(self, _read(file.path))

        def stored_quantization(path: str, module: nn.Module) -> bool | dict:
            if f"{prefix}{path}.scales" not in stacked:
                return False
            return quantization.get(prefix + path, default)

        module = SwitchGLU(args.hidden_size, args.moe_intermediate_size, args.n_routed_experts)
        nn.quantize(module, **default, class_predicate=stored_quantization)
        module.load_weights([(name.removeprefix(prefix), value) for name, value in stacked.items()])
        module.freeze()
        return module


def _read(path: Path) -> dict[str, mx.array]:
    """The arrays of a safetensors file, lazy."""
    return cast(dict[str, mx.array], mx.load(str(path)))


def _arrays(module: nn.Module) -> list[tuple[str, mx.array]]:
    """A module's parameters and their names."""
    return cast(list[tuple[str, mx.array]], tree_flatten(module.parameters()))


def _float32(x: mx.array) -> mx.array:
    return x.astype(mx.float32) if x.dtype in (mx.bfloat16, mx.float16) else x
