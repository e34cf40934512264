"""The bytes that the trunk, the KV caches and a prefill chunk take, and how many are left for expert slots. No MLX."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from ..checkpoint.directory import MTP_FILE, Directory
from ..config.model_args import SLACK, ModelArgs
from ..errors import MimoError
from ..units import GB, format_size
from . import backend

if TYPE_CHECKING:
    from ..checkpoint.header import TensorEntry
    from ..checkpoint.layout import StoredTensor
    from ..checkpoint.recipe import Recipe

    Tensor = StoredTensor | TensorEntry

FLOOR_BYTES = 4 * GB  # left to the system and its page cache: speed falls when both starve (docs/RESIDENCY.md)
CONTEXT = 32768  # tokens of KV cache that `auto` leaves room for
CHUNK = 2048  # prompt tokens of a prefill chunk, where the memory at hand suggests no other
_SMALLER_CHUNKS = (1024, 512, 256)
LARGE_CHUNK = 4096


@dataclass(frozen=True)
class Budget:
    """The bytes that the parts of a model take in memory."""

    trunk: int
    experts: int  # all of them, in slots
    kv: int  # both kinds of cache at `context` tokens, one sequence
    context: int
    chunk: int  # prompt tokens of a prefill chunk
    token_bytes: int  # activations of one token of a chunk
    score_bytes: int  # of one token's attention scores, at full context
    logits_bytes: int
    num_experts: int  # of all layers together
    embedding: int  # part of the trunk; a token reads one row of it
    record_bytes: int  # of one expert on disk, the mean where they differ

    @property
    def transients(self) -> int:
        """Activations and attention scores of one prefill chunk, and the logits."""
        return self.chunk * self.token_bytes + min(self.chunk, self.context) * self.score_bytes + self.logits_bytes

    @property
    def non_expert_bytes(self) -> int:
        return self.trunk + self.kv + self.transients

    @property
    def everything(self) -> int:
        return self.non_expert_bytes + self.experts

    @property
    def slot_bytes(self) -> int:
        """What one expert takes in memory, the mean where they differ."""
        return self.experts // max(self.num_experts, 1)

    def with_chunk(self, chunk: int) -> "Budget":
        return replace(self, chunk=chunk)


class ItemBytes(NamedTuple):
    """Bytes in memory of one activation, and of one 16-bit number in the files of the trunk's and the experts' weights.

    Such a number is a weight that is not quantised, or a scale or a bias.
    """

    activation: int
    trunk: int
    experts: int


def item_bytes(cpu: bool, kernels: bool | None = None, trunk_kernels: bool = True) -> ItemBytes:
    """The ItemBytes of a backend. A GPU computes in 16 bits; a CPU in float32, and its kernels read matrices as stored.

    `kernels` says whether the experts use the CPU kernels (None: if they are available here), `trunk_kernels` whether
    the trunk uses them too, as it does not with an adapter or inside mlx-lm's commands.
    """
    if not cpu:
        return ItemBytes(2, 2, 2)
    if kernels is None:
        kernels = backend.kernels_available()
    return ItemBytes(4, 2 if kernels and trunk_kernels else 4, 2 if kernels else 4)


def usual_context(args: ModelArgs) -> int:
    """Tokens of KV cache that `auto` leaves room for: CONTEXT, or the model's maximum if that is less."""
    return min(CONTEXT, args.max_position_embeddings)


def kv_bytes(args: ModelArgs, context: int, item_bytes: int) -> int:
    """Bytes of one sequence's KV caches at `context` tokens.

    A sliding layer's buffer holds up to twice its window and slack.
    """
    total = 0
    for layer in range(args.num_hidden_layers):
        tokens = min(context, 2 * (args.window - 1 + SLACK)) if args.is_sliding(layer) else context
        total += tokens * args.kv_heads(layer) * sum(args.head_dims(layer)) * item_bytes
    return total


def measure(
    directory: Directory | str | os.PathLike[str], args: ModelArgs, context: int, chunk: int, *item: int
) -> Budget:
    """The budget of a converted directory, from its files' headers alone; `item` is an ItemBytes.

    Raises FormatError for a file that is not whole, or an expert file that is not in the format of records.
    """
    directory = Directory.of(directory)
    alike = {file.path.name: file.num_experts for file in directory.expert_files.values()}
    tensors: list[tuple[Tensor, int]] = []
    for path in directory.weight_files:
        entries = directory.header(path.name).tensors
        if path.name in alike:  # its experts have one layout: those of the first, as often as there are experts
            count = alike[path.name]
            tensors += ((entry, count) for entry in entries.values() if ".mlp.experts.0." in entry.name)
        elif path.name != MTP_FILE:
            tensors += ((entry, 1) for entry in entries.values())
    return budget_of(tensors, args, context, chunk, *item)


def estimate(config: dict[str, Any], recipe: "Recipe", args: ModelArgs, context: int, chunk: int, *item: int) -> Budget:
    """The budget of what converting a checkpoint with this config.json by `recipe` would give. No file is read."""
    from ..checkpoint import shapes
    from ..checkpoint.layout import layout_of

    # The layout with one expert in each layer; experts, and the router's rows, count n_routed_experts times.
    small = dict(config) | {"n_routed_experts": 1}
    wanted = shapes.trunk_shapes(small)
    for layer in shapes.moe_layers(small):
        wanted += shapes.expert_shapes(small, layer)
    tensors: list[tuple[Tensor, int]] = []
    for file in layout_of(small, [shape.name for shape in wanted], recipe).files:
        for output in file.items:
            many = output.source.kind == "router" or output.source.kind.startswith("experts.")
            tensors += ((stored, args.n_routed_experts if many else 1) for stored in output.stored)
    return budget_of(tensors, args, context, chunk, *item)


def budget_of(tensors: Iterable[tuple["Tensor", int]], args: ModelArgs, context: int, chunk: int, *item: int) -> Budget:
    """The budget of `tensors`, each (a tensor, how many there are of it). `item` is an ItemBytes; of two numbers the
    second is both the trunk's and the experts'.
    """
    sizes = ItemBytes(item[0], item[1], item[-1])
    trunk = experts = embedding = on_disk = 0
    for tensor, many in tensors:
        if ".mlp.experts." in tensor.name or ".switch_mlp." in tensor.name:
            experts += many * _in_memory(tensor, sizes.experts)
            on_disk += many * tensor.nbytes
            continue
        # Norms, sinks and biases meet the activations, so they have their type.
        nbytes = many * _in_memory(tensor, sizes.trunk if len(tensor.shape) > 1 else sizes.activation)
        trunk += nbytes
        if ".embed_tokens." in tensor.name:
            embedding += nbytes
    widest = max(args.intermediate_size, args.num_attention_heads * args.head_dim, 4 * args.hidden_size)
    pairs = args.num_experts_per_tok * (args.hidden_size + 3 * args.moe_intermediate_size)
    count = len(args.moe_layers) * args.n_routed_experts
    return Budget(
        trunk=trunk,
        experts=experts,
        kv=kv_bytes(args, context, sizes.activation),
        context=context,
        chunk=chunk,
        token_bytes=(3 * widest + pairs) * sizes.activation,
        # Of one global layer, where no fused kernel takes 192/128 prefill heads.
        score_bytes=context * args.num_attention_heads * sizes.activation // 8,
        logits_bytes=args.vocab_size * 4,
        num_experts=count,
        embedding=embedding,
        record_bytes=on_disk // max(count, 1),
    )


def _in_memory(tensor: "Tensor", item: int) -> int:
    return tensor.nbytes // 2 * item if tensor.dtype in ("BF16", "F16") else tensor.nbytes


@dataclass(frozen=True)
class Fit:
    """The share of a machine's memory that experts get, and the prefill chunk that fits beside them."""

    expert_bytes: int  # of slots; at most all experts
    budget: Budget  # with the chunk that was chosen

    @property
    def chunk(self) -> int:
        return self.budget.chunk


def fit(
    budget: Budget,
    available: int,
    expert_memory: str | int = "auto",
    streamed: bool = True,
    large: bool = True,
    fixed: bool = False,
) -> Fit:
    """Divides `available` bytes, which must hold the whole model, between experts and a prefill chunk.

    `expert_memory` is "auto", "all", or a number of bytes, which is granted whatever is free; `streamed` is whether
    experts can be read one by one. `large` allows chunks larger than usual, which help where reading takes the time
    and so not on a CPU. `fixed` keeps the budget's own chunk, for callers that cannot choose it. Raises MimoError where
    `auto` finds no room for one expert.
    """
    chunks = (budget.chunk,) if fixed else (CHUNK, *_SMALLER_CHUNKS)
    if expert_memory == "auto" and streamed:
        room = auto_expert_bytes(budget.with_chunk(chunks[0]), available, refuse=False)
        return _fit_auto(budget, available, _with_larger(chunks, budget, room) if large and not fixed else chunks)
    wanted = budget.experts if isinstance(expert_memory, str) else min(expert_memory, budget.experts)
    left = available - budget.trunk - budget.kv - wanted
    for chunk in _with_larger(chunks, budget, wanted) if large and not fixed else chunks:
        found = budget.with_chunk(chunk)
        # The size asked for is granted; the chunk takes of the rest, and a larger one must leave the floor free.
        if found.transients <= left - (FLOOR_BYTES if chunk == LARGE_CHUNK else 0):
            break
    return Fit(wanted, found)


def _fit_auto(budget: Budget, available: int, chunks: Sequence[int]) -> Fit:
    """The largest chunk that takes no more memory than it leaves to experts, or the smallest chunk."""
    for chunk in chunks:
        found = budget.with_chunk(chunk)
        room = auto_expert_bytes(found, available, refuse=chunk == chunks[-1])
        if room >= min(found.transients, budget.experts) and room > 0:
            break
    return Fit(min(room, budget.experts), found)


def _with_larger(chunks: Sequence[int], budget: Budget, room: int) -> Sequence[int]:
    """The chunks to try, with LARGE_CHUNK first where it is worth its memory.

    It halves how often a long prompt reads each absent expert, and takes the place of some resident ones. It is worth
    that where these are few compared with both the resident and the absent experts.
    """
    more = 20 * budget.with_chunk(LARGE_CHUNK).transients
    worth = budget.context >= LARGE_CHUNK and more <= min(room, budget.experts - room)
    return (LARGE_CHUNK, *chunks) if worth else chunks


def auto_expert_bytes(budget: Budget, available: int, refuse: bool = True) -> int:
    """Bytes of experts that `--expert-memory auto` keeps where `available` bytes are free.

    They can be negative: by so much the rest of the model is too large. With `refuse`, room for less than one expert
    raises MimoError.
    """
    # A small or busy machine leaves less than FLOOR_BYTES to the system, since the model needs its other parts to run.
    floor = min(max(FLOOR_BYTES, available // 10), available // 2)
    room = available - floor - budget.non_expert_bytes
    if refuse and room < max(1, budget.slot_bytes):
        raise MimoError(
            f"{format_size(available)} of memory are free; {format_size(budget.non_expert_bytes)} are needed before "
            f"the first expert, and {format_size(floor)} are left to the system: close other programs, or set "
            "--expert-memory yourself"
        )
    return room
