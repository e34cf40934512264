"""Bytes: what the trunk, the KV caches and a step take, and how much is left for expert slots. No MLX."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import MimoError, UsageError
from ..experts.header import read_header
from ..models.config import SLACK, ModelArgs

if TYPE_CHECKING:
    from ..convert.plan import Stored
    from ..convert.recipe import Recipe
    from ..experts.header import TensorEntry

    Tensor = Stored | TensorEntry

GB = 10**9
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": GB, "TB": 10**12}
_UNITS |= {"K": 10**3, "M": 10**6, "G": GB, "T": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
FLOOR_BYTES = 4 * GB  # left to the system and its page cache: speed falls when both starve (docs/RESIDENCY.md)


def parse_size(text: str | int) -> int:
    """Bytes of "24GB", "1.5 GiB", "800MB" or a plain number. GB = 10⁹ bytes. Raises UsageError."""
    if isinstance(text, int):
        if text > 0:
            return text
        raise UsageError(f"size {text}: a number of bytes above 0 expected")
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    if not match or match[2].upper() not in _UNITS or float(match[1]) <= 0:
        raise UsageError(f"size {text!r}: something like 24GB or 800MB expected")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def parse_speed(text: str) -> float:
    """Bytes per second of "6GB/s", or of a plain size. Raises UsageError."""
    try:
        return float(parse_size(text.strip().removesuffix("/s").removesuffix("ps")))
    except UsageError:
        raise UsageError(f"speed {text!r}: something like 6GB/s or 800MB/s expected") from None


def format_size(nbytes: int) -> str:
    """'24.0 GB', '14.2 MB': powers of ten, as in `--expert-memory`."""
    for unit in ("TB", "GB", "MB", "kB"):
        scale = {"TB": 10**12, "GB": GB, "MB": 10**6, "kB": 10**3}[unit]
        if nbytes >= scale:
            return f"{nbytes / scale:.1f} {unit}"
    return f"{nbytes} bytes"


@dataclass(frozen=True)
class Budget:
    """What a model takes in memory, in bytes."""

    trunk: int
    experts: int  # all of them, as slots
    kv: int  # both kinds of cache at `context` tokens, one sequence
    transients: int  # activations of one prefill chunk
    num_experts: int  # of all layers together
    embedding: int  # of the trunk: a token needs one row of it
    record_bytes: int  # of one expert on disk, the mean where they differ

    @property
    def everything(self) -> int:
        return self.trunk + self.experts + self.kv + self.transients

    @property
    def slot_bytes(self) -> int:
        """Of one expert in memory, the mean where they differ."""
        return self.experts // max(self.num_experts, 1)


def kv_bytes(args: ModelArgs, context: int, item_bytes: int) -> int:
    """Bytes of one sequence's KV caches at `context` tokens; a sliding layer's buffer holds up to twice its window
    and slack."""
    total = 0
    for layer in range(args.num_hidden_layers):
        tokens = min(context, 2 * (args.window - 1 + SLACK)) if args.is_sliding(layer) else context
        total += tokens * args.kv_heads(layer) * sum(args.head_dims(layer)) * item_bytes
    return total


def measure(
    directory: Path, args: ModelArgs, context: int, chunk: int, item_bytes: int, trunk_item_bytes: int
) -> Budget:
    """The budget of a converted directory, from its files' headers alone.

    `item_bytes` is the size of an activation. `trunk_item_bytes` is what a BF16 parameter takes in memory: 2, or 4
    where the CPU runs float32.
    """
    tensors = []
    for path in sorted(directory.glob("model*.safetensors")):
        if not path.name.startswith("model-mtp"):
            tensors += read_header(path).tensors.values()
    return budget_of(tensors, args, context, chunk, item_bytes, trunk_item_bytes)


def estimate(
    config: dict, recipe: "Recipe", args: ModelArgs, context: int, chunk: int, item_bytes: int, trunk_item_bytes: int
) -> Budget:
    """The budget that converting a checkpoint of this config.json by `recipe` would give; nothing is read for it."""
    from ..convert import shapes
    from ..convert.plan import make_plan

    # A plan with one expert a layer: experts, and a router's rows, are as many times that.
    small = dict(config) | {"n_routed_experts": 1}
    wanted = shapes.trunk_shapes(small)
    for layer in shapes.moe_layers(small):
        wanted += shapes.expert_shapes(small, layer)
    tensors = []
    for file in make_plan(small, [shape.name for shape in wanted], recipe).files:
        for item in file.items:
            many = item.source.kind == "router" or item.source.kind.startswith("experts.")
            tensors += item.stored * (args.n_routed_experts if many else 1)
    return budget_of(tensors, args, context, chunk, item_bytes, trunk_item_bytes)


def budget_of(
    tensors: Iterable["Tensor"], args: ModelArgs, context: int, chunk: int, item_bytes: int, trunk_item_bytes: int
) -> Budget:
    trunk = experts = embedding = on_disk = 0
    for tensor in tensors:
        nbytes = tensor.nbytes // 2 * trunk_item_bytes if tensor.dtype in ("BF16", "F16") else tensor.nbytes
        if ".mlp.experts." in tensor.name or ".switch_mlp." in tensor.name:
            experts += nbytes
            on_disk += tensor.nbytes
            continue
        trunk += nbytes
        if ".embed_tokens." in tensor.name:
            embedding += nbytes
    widest = max(args.intermediate_size, args.num_attention_heads * args.head_dim, 4 * args.hidden_size)
    pairs = args.num_experts_per_tok * (args.hidden_size + 3 * args.moe_intermediate_size)
    transients = chunk * (3 * widest + pairs) * item_bytes + args.vocab_size * 4
    # Scores of one global layer, where no fused kernel takes 192/128 prefill heads.
    transients += min(chunk, context) * context * args.num_attention_heads * item_bytes // 8
    count = len(args.moe_layers) * args.n_routed_experts
    kv = kv_bytes(args, context, item_bytes)
    return Budget(trunk, experts, kv, transients, count, embedding, on_disk // max(count, 1))


def auto_expert_bytes(budget: Budget, available: int) -> int:
    """Bytes of experts that `--expert-memory auto` keeps in `available` free bytes. Raises MimoError where not even
    the rest of the model fits."""
    room = available - max(FLOOR_BYTES, available // 10) - (budget.everything - budget.experts)
    if room <= 0:
        # On a small or busy machine the floor is a wish; without the model's other parts nothing runs.
        room = available // 2 - (budget.everything - budget.experts)
    if room <= 0:
        raise MimoError(
            f"{format_size(available)} of memory are free; the model needs "
            f"{format_size(2 * (budget.everything - budget.experts))} before the first expert: close other programs, "
            f"or set --expert-memory yourself"
        )
    return room


def available_memory(working_set: int | None = None) -> int:
    """Free memory in bytes; `working_set` is Metal's recommended limit where there is one."""
    import psutil

    available = psutil.virtual_memory().available
    return min(available, working_set) if working_set else available
