"""A directory or Hub repo → (model, tokenizer): chooses the backend and which experts are in memory."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn

from ..checkpoint.directory import Directory
from ..config.model_args import ModelArgs
from ..cpu.adapt import adapt
from ..device import choose as choose_device
from ..errors import FormatError, MimoError, UsageError
from ..experts.residency import Residency, attach
from ..planning.budget import CHUNK, Fit, fit, item_bytes, measure, usual_context
from ..planning.memory import available_memory
from ..units import parse_size
from .adapters import check_adapter, put_adapter
from .compute import choose_compute
from .loaded import Loaded, LoadedModel
from .sampling import generation_defaults
from .source import find

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

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
    tokenizer_config: dict[str, Any] | None = None,
    progress: bool = False,
) -> tuple[LoadedModel, "TokenizerWrapper"]:
    """Loads a converted directory, or a Hub repo that holds one; None is the embedded demo model.

    Args:
        expert_memory: Bytes of expert slots as a number or text such as "24GB", "auto" (what is free), or "all"
            (everything resident).
        expert_policy: Which expert leaves when slots are full: "lfu" or "lru".
        sliding_window: Keys that a query sees in sliding layers, its own included; None takes config.json's.
        profile: A file of usage counts. It is loaded now where it exists, and saved by
            `model.residency.save_profile`.
        lookahead: Reads ahead the experts that the next layer is likely to need.
        trace: A file into which the routers' choices are recorded until `model.residency.close`.
        threads: CPU threads of the kernels; None takes one for each core.
        reader_threads: Experts that are read at a time, 1 to 64.
        adapter_path: A directory that mlx_lm.lora wrote. Adapters on experts are refused where these may stream.
        tokenizer_config: Further arguments of transformers' AutoTokenizer.from_pretrained.
        progress: Shows a bar on stderr while a profile's experts are read.

    Returns the model and mlx-lm's tokenizer wrapper. The model works in mlx_lm's generate, stream_generate and
    batch_generate. `model.residency` holds the counters, and its `close` must be called at the end: it ends threads
    and the trace. `model.loaded` holds what else is known of the model on this machine.

    Raises FormatError for a directory that cannot be run, UsageError for a wrong argument, and MimoError where
    arguments and model do not go together or too little memory is free; each names the file or field.
    """
    choose_device()
    if expert_memory not in ("auto", "all"):
        expert_memory = parse_size(expert_memory)
    check_reader_threads(reader_threads)
    directory = find(path_or_hf_repo)
    overrides = {} if sliding_window is None else {"window_keys": sliding_window}
    args = ModelArgs.from_dict(directory.config | overrides)
    directory.check()
    mx.set_cache_limit(cache_limit())
    if threads is not None:
        from ..cpu import set_threads

        set_threads(threads)
    streamable = directory.is_streamable
    if not streamable and isinstance(expert_memory, int):
        raise FormatError(
            f"{directory.path}: its experts are stacked, so one cannot be read alone; "
            f"run mlx_mimo convert repack {directory.path} --in-place, or give --expert-memory all"
        )
    if adapter_path is not None:
        check_adapter(adapter_path, residency=streamable)
    # LoRA layers need MLX's own modules.
    model = load_trunk(directory, overrides, streamable, kernels=adapter_path is None)
    found = expert_limit(directory, args, expert_memory if streamable else "all", kernels=adapter_path is None)
    residency = None
    if streamable:
        residency = attach(
            model,
            directory,
            expert_memory_bytes=None if expert_memory == "all" else found.expert_bytes,
            policy=expert_policy,
            compute_for=choose_compute,
            reader_threads=reader_threads,
            lookahead=lookahead,
        )
    model.loaded = Loaded(
        residency=residency,
        prefill_chunk=found.chunk,
        synchronous=is_synchronous(residency),
        sampling=generation_defaults(directory.path),
    )
    try:
        if adapter_path is not None:
            put_adapter(model, adapter_path)
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
    """Returns the number. Raises UsageError where it is outside of 1 to MOST_READER_THREADS."""
    if not 1 <= count <= MOST_READER_THREADS:
        raise UsageError(f"reader threads: 1 to {MOST_READER_THREADS} expected, {count} found")
    return count


def on_cpu() -> bool:
    return mx.default_device() == mx.Device(mx.cpu)


def is_synchronous(residency: Residency | None) -> bool:
    """Whether layers wait for the host: on a CPU, whose kernels do, and where experts are streamed."""
    return on_cpu() or (residency is not None and not residency.all_resident)


def cache_limit() -> int:
    """Bytes of freed buffers that MLX may keep. On the CPU none: keeping them saves no time there."""
    return 0 if on_cpu() else CACHE_LIMIT_BYTES


class ExpertsElsewhere(nn.Module):
    """A placeholder for a layer's experts, so that loading the trunk allocates nothing for them."""


class TrunkModel(LoadedModel):
    """The model without experts, which residency adds."""

    def __init__(self, args: ModelArgs):
        super().__init__(args)
        for layer in args.moe_layers:
            self.model.layers[layer].mlp.switch_mlp = ExpertsElsewhere()

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        return super().sanitize({name: w for name, w in weights.items() if ".mlp.experts." not in name})


def load_trunk(directory: Directory, overrides: dict, without_experts: bool, kernels: bool = True) -> LoadedModel:
    """Loads the model's weights, and returns it. `without_experts` leaves experts out: they lie in their own files.
    `kernels` uses the CPU kernels on a CPU. Raises FormatError where weights and config do not go together."""
    from mlx_lm.utils import load_model

    classes = (TrunkModel if without_experts else LoadedModel, ModelArgs)
    try:
        # model_file would import code from the directory; our own classes are used instead.
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


def expert_limit(
    directory: Directory, args: ModelArgs, expert_memory: str | int, kernels: bool = True, fixed_chunk: bool = False
) -> Fit:
    """Bytes for experts, and the prefill chunk that fits beside them: the usual one where it is fixed. `kernels` as
    `load_trunk` was given it."""
    sizes = item_bytes(on_cpu(), trunk_kernels=kernels)
    budget = measure(directory, args, usual_context(args), CHUNK, *sizes)
    # The trunk is loaded by now, so what is free no longer contains it.
    return fit(
        budget, available_memory(working_set(), held=budget.trunk), expert_memory, large=not on_cpu(), fixed=fixed_chunk
    )


def working_set() -> int | None:
    """Bytes that Metal recommends a process to keep; None elsewhere."""
    size = None if on_cpu() else mx.device_info().get("max_recommended_working_set_size")
    return size if isinstance(size, int) else None


def load_tokenizer(directory: Directory, tokenizer_config: dict[str, Any] | None = None) -> "TokenizerWrapper":
    """mlx-lm's tokenizer wrapper, with every end token that config.json or generation_config.json names. Raises
    FormatError where the tokenizer's files are wrong."""
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


def _residency_of(model: LoadedModel, directory: Directory, flag: str) -> Residency:
    if model.residency is None:
        raise MimoError(f"{flag}: {directory.path} has stacked experts; run mlx_mimo convert repack on it first")
    return model.residency


class _Bar:
    """A progress callback (done, total) that shows a tqdm bar where `shown` is set."""

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
