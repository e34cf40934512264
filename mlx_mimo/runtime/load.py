"""A directory or Hub repo → (model, tokenizer): chooses the backend and which experts are in memory."""

import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from ..cpu import adapt
from ..device import choose as choose_device
from ..errors import FormatError, MimoError, UsageError
from ..experts.header import read_header
from ..experts.record import expert_files
from ..experts.residency import Residency, attach
from ..models.config import ModelArgs
from ..models.mimo_v2_flash import Model
from .adapters import check_adapter, put_adapter
from .budget import CHUNK, Fit, available_memory, fit, item_bytes, measure, parse_size, usual_context
from .sampling import generation_defaults
from .source import Directory, find

MOST_READER_THREADS = 64
CACHE_LIMIT_BYTES = 2 * 10**9  # of freed buffers that MLX keeps on a GPU; its default is nearly all memory


def load(
    path_or_hf_repo: str | Path | None = None,
    *,
    expert_memory: str | int = "auto",
    expert_policy: str = "lfu",
    sliding_window: int | None = None,
    profile: str | Path | None = None,
    lookahead: bool = False,
    trace: str | Path | None = None,
    threads: int | None = None,
    reader_threads: int = 8,
    adapter_path: str | Path | None = None,
    tokenizer_config: dict | None = None,
    progress: bool = False,
) -> tuple[nn.Module, object]:
    """Loads a converted directory, or a Hub repo that holds one; None is the embedded demo model.

    `expert_memory` is the bytes of expert slots as a number or text such as "24GB", "auto" (what is free), or "all"
    (everything resident). `sliding_window` is the number of keys a query sees in sliding layers, itself included.
    `adapter_path` is a directory that mlx_lm.lora wrote; adapters on experts are refused where these may stream.
    `reader_threads` is how many experts are read at a time, 1 to 64.
    `profile` is a file of usage counts: loaded now where it exists, saved by `model.residency.save_profile`.
    The model works in mlx_lm's generate, stream_generate and batch_generate; `model.residency` holds the counters.
    Raises FormatError, MimoError or UsageError, each naming the file or field.
    """
    choose_device()
    if expert_memory not in ("auto", "all"):
        expert_memory = parse_size(expert_memory)
    check_reader_threads(reader_threads)
    directory = find(path_or_hf_repo)
    overrides = {} if sliding_window is None else {"window_keys": sliding_window}
    args = ModelArgs.from_dict(directory.config | overrides)
    check_files(directory.path)
    mx.set_cache_limit(cache_limit())
    if threads is not None:
        from ..cpu import set_threads

        set_threads(threads)
    streamable = bool(expert_files(directory.path))
    if not streamable and isinstance(expert_memory, int):
        raise FormatError(
            f"{directory.path}: its experts are stacked, so one cannot be read alone; "
            f"run mlx_mimo convert repack {directory.path} --in-place, or give --expert-memory all"
        )
    if adapter_path is not None:
        check_adapter(adapter_path, residency=streamable)
    model = load_trunk(directory, overrides, streamable, kernels=adapter_path is None)  # LoRA layers want MLX's
    model.residency = None
    found = expert_limit(directory, args, expert_memory if streamable else "all", kernels=adapter_path is None)
    model.prefill_chunk = found.chunk
    if streamable:
        model.residency = attach(
            model,
            directory.path,
            expert_memory_bytes=None if expert_memory == "all" else found.expert_bytes,
            policy=expert_policy,
            reader_threads=reader_threads,
            lookahead=lookahead,
        )
    model.synchronous = on_cpu() or bool(model.residency and not model.residency.all_resident)
    model.generation_defaults = generation_defaults(directory.path)
    residency = model.residency
    try:
        if adapter_path is not None:
            model = put_adapter(model, adapter_path)
        if trace is not None:
            _residency_of(model, directory, "--trace").trace_to(trace)
        if profile is not None and Path(profile).exists():
            with _Bar("reading experts", progress) as bar:
                _residency_of(model, directory, "--profile").load_profile(profile, bar)
        return model, load_tokenizer(directory, tokenizer_config)
    except BaseException:
        if residency is not None:
            residency.close()
        raise


def check_reader_threads(count: int) -> int:
    """The number, or UsageError where no disk has use for so many."""
    if not 1 <= count <= MOST_READER_THREADS:
        raise UsageError(f"reader threads: 1 to {MOST_READER_THREADS} expected, {count} found")
    return count


def on_cpu() -> bool:
    return mx.default_device() == mx.Device(mx.cpu)


def cache_limit() -> int:
    """Bytes of freed buffers that MLX keeps. On the CPU none: keeping them saves no time there."""
    return 0 if on_cpu() else CACHE_LIMIT_BYTES


class ExpertsElsewhere(nn.Module):
    """Stands where a layer's experts will stand, so that loading the trunk allocates nothing for them."""


class TrunkModel(Model):
    """The model before residency gives it experts: every weight but theirs."""

    def __init__(self, args: ModelArgs):
        super().__init__(args)
        for layer in args.moe_layers:
            self.model.layers[layer].mlp.switch_mlp = ExpertsElsewhere()

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        return super().sanitize({name: w for name, w in weights.items() if ".mlp.experts." not in name})


def load_trunk(directory: Directory, overrides: dict, without_experts: bool, kernels: bool = True) -> nn.Module:
    """The model with its weights; without experts where they lie in expert files of their own. `kernels` lets the CPU
    kernels have it on a CPU."""
    from mlx_lm.utils import load_model

    classes = (TrunkModel if without_experts else Model, ModelArgs)
    try:
        # model_file would import code of the directory; the classes are ours here.
        model, _ = load_model(
            directory.path,
            lazy=True,
            model_config=overrides | {"model_file": None},
            get_model_classes=lambda config: classes,
        )
    except (ValueError, RuntimeError, FileNotFoundError) as error:
        raise FormatError(f"{directory.path.name}: {error}; run the same mlx_mimo convert again to mend it") from error
    if on_cpu():
        adapt(model, kernels)
    mx.eval(model.parameters())
    return model


def check_files(path: Path) -> None:
    """Every file that the index names is there, whole, and holds the tensors it should. Raises FormatError."""
    index = path / "model.safetensors.index.json"
    if not index.exists():
        if not list(path.glob("model*.safetensors")):
            raise FormatError(f"{path}: no model*.safetensors; a converted directory expected")
        return
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        wanted: dict[str, set[str]] = {}
        for name, file in weight_map.items():
            wanted.setdefault(file, set()).add(name)
        if not all(isinstance(file, str) for file in wanted):
            raise TypeError("a file's name is no text")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise FormatError(f"{index.name}: not an index of safetensors files ({error!r}); convert again") from None
    for file, names in wanted.items():
        absent = names - read_header(path / file).tensors.keys()
        if absent:
            raise FormatError(f"{file}: {min(absent)} is missing, {index.name} expects it here; convert again")


def expert_limit(
    directory: Directory, args: ModelArgs, expert_memory: str | int, kernels: bool = True, fixed_chunk: bool = False
) -> Fit:
    """Bytes for experts, and the prefill chunk that fits beside them: the usual one where it is fixed. `kernels` as
    `load_trunk` was given it."""
    sizes = item_bytes(on_cpu(), trunk_kernels=kernels)
    budget = measure(directory.path, args, usual_context(args), CHUNK, *sizes)
    # The trunk is loaded by now, so what is free no longer contains it.
    return fit(
        budget, available_memory(working_set(), held=budget.trunk), expert_memory, large=not on_cpu(), fixed=fixed_chunk
    )


def working_set() -> int | None:
    """Bytes that Metal recommends a process to keep; None elsewhere."""
    return None if on_cpu() else mx.device_info().get("max_recommended_working_set_size")


def load_tokenizer(directory: Directory, tokenizer_config: dict | None = None):
    """mlx-lm's tokenizer wrapper, ending on every end token that config.json or generation_config.json names."""
    from mlx_lm.utils import load_tokenizer as mlx_lm_load_tokenizer

    ends = set()
    for file in (directory.path / "generation_config.json", directory.path / "config.json"):
        if file.exists():
            found = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
            ends |= set(found if isinstance(found, list) else [found]) - {None}
    try:
        return mlx_lm_load_tokenizer(directory.path, tokenizer_config, eos_token_ids=sorted(ends) or None)
    except Exception as error:  # transformers raises many kinds, all of which mean the same here
        raise FormatError(f"{directory.path}: the tokenizer cannot be loaded ({error}); copy its files anew") from error


def _residency_of(model: nn.Module, directory: Directory, flag: str) -> Residency:
    if model.residency is None:
        raise MimoError(f"{flag}: {directory.path} has stacked experts; run mlx_mimo convert repack on it first")
    return model.residency


class _Bar:
    """tqdm as a callback (done, total), or nothing where nobody looks."""

    def __init__(self, title: str, shown: bool):
        self.title, self.shown, self.bar = title, shown, None

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, *_) -> None:
        if self.bar is not None:
            self.bar.close()

    def __call__(self, done: int, total: int) -> None:
        if self.shown and self.bar is None:
            from tqdm import tqdm

            self.bar = tqdm(total=total, desc=self.title, unit="expert", leave=False)
        if self.bar is not None:
            self.bar.update(done - self.bar.n)
