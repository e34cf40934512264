"""Bytes: what the trunk, the KV caches and a step take, and how much is left for expert slots. No MLX."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..checkpoint.header import read_header
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
    """What a model takes in memory, in bytes."""

    trunk: int
    experts: int  # all of them, as slots
    kv: int  # both kinds of cache at `context` tokens, one sequence
    context: int
    chunk: int  # prompt tokens of a prefill chunk
    token_bytes: int  # activations of one token of a chunk
    score_bytes: int  # of one token's attention scores, at full context
    logits_bytes: int
    num_experts: int  # of all layers together
    embedding: int  # of the trunk: a token needs one row of it
    record_bytes: int  # of one expert on disk, the mean where they differ

    @property
    def transients(self) -> int:
        """Activations of one prefill chunk."""
        return self.chunk * self.token_bytes + min(self.chunk, self.context) * self.score_bytes + self.logits_bytes

    @property
    def besides(self) -> int:
        """All but the experts."""
        return self.trunk + self.kv + self.transients

    @property
    def everything(self) -> int:
        return self.besides + self.experts

    @property
    def slot_bytes(self) -> int:
        """Of one expert in memory, the mean where they differ."""
        return self.experts // max(self.num_experts, 1)

    def with_chunk(self, chunk: int) -> "Budget":
        return replace(self, chunk=chunk)


class ItemBytes(NamedTuple):
    """What an activation takes in memory, and what a matrix takes for each 16-bit number of it on disk: its weights
    where they are not quantised, its scales where they are."""

    activation: int
    trunk: int
    experts: int


def item_bytes(cpu: bool, kernels: bool | None = None, trunk_kernels: bool = True) -> ItemBytes:
    """On a GPU all is 16 bits wide. The CPU computes in float32, and its kernels read matrices as they are stored.

    `kernels` says whether there are any (None: whether they can be used here), `trunk_kernels` whether the trunk has
    them too: under an adapter, and inside mlx-lm's commands, it has not.
    """
    if not cpu:
        return ItemBytes(2, 2, 2)
    if kernels is None:
        kernels = backend.kernels_available()
    return ItemBytes(4, 2 if kernels and trunk_kernels else 4, 2 if kernels else 4)


def usual_context(args: ModelArgs) -> int:
    """Tokens that `auto` leaves room for: at most what the model takes."""
    return min(CONTEXT, args.max_position_embeddings)


def kv_bytes(args: ModelArgs, context: int, item_bytes: int) -> int:
    """Bytes of one sequence's KV caches at `context` tokens; a sliding layer's buffer holds up to twice its window
    and slack."""
    total = 0
    for layer in range(args.num_hidden_layers):
        tokens = min(context, 2 * (args.window - 1 + SLACK)) if args.is_sliding(layer) else context
        total += tokens * args.kv_heads(layer) * sum(args.head_dims(layer)) * item_bytes
    return total


def measure(directory: Path, args: ModelArgs, context: int, chunk: int, *item: int) -> Budget:
    """The budget of a converted directory, from its files' headers alone; `item` is an ItemBytes."""
    tensors = []
    for path in sorted(directory.glob("model*.safetensors")):
        if not path.name.startswith("model-mtp"):
            tensors += ((entry, 1) for entry in read_header(path).tensors.values())
    return budget_of(tensors, args, context, chunk, *item)


def estimate(config: dict, recipe: "Recipe", args: ModelArgs, context: int, chunk: int, *item: int) -> Budget:
    """The budget that converting a checkpoint of this config.json by `recipe` would give; nothing is read for it."""
    from ..checkpoint import shapes
    from ..checkpoint.layout import layout_of

    # A plan with one expert a layer: experts, and a router's rows, are as many times that.
    small = dict(config) | {"n_routed_experts": 1}
    wanted = shapes.trunk_shapes(small)
    for layer in shapes.moe_layers(small):
        wanted += shapes.expert_shapes(small, layer)
    tensors = []
    for file in layout_of(small, [shape.name for shape in wanted], recipe).files:
        for output in file.items:
            many = output.source.kind == "router" or output.source.kind.startswith("experts.")
            tensors += ((stored, args.n_routed_experts if many else 1) for stored in output.stored)
    return budget_of(tensors, args, context, chunk, *item)


def budget_of(tensors: Iterable[tuple["Tensor", int]], args: ModelArgs, context: int, chunk: int, *item: int) -> Budget:
    """`tensors` are (one, how many there are of it). `item` is an ItemBytes; two numbers give experts what the trunk
    has."""
    sizes = ItemBytes(*item) if len(item) == 3 else ItemBytes(*item, item[-1])
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
    """What a model is given of a machine's memory."""

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
    """Shares `available` bytes, in which the whole model must go, between experts and a prefill chunk.

    `large` lets chunks be larger than usual; on a CPU they are not: there arithmetic takes the time, not reading.
    `fixed` keeps the budget's own chunk, for a program that would not ask. Raises MimoError where `auto` finds no room
    for an expert. A size is taken as it is, whatever is free.
    """
    chunks = (budget.chunk,) if fixed else (CHUNK, *_SMALLER_CHUNKS)
    if expert_memory == "auto" and streamed:
        room = auto_expert_bytes(budget.with_chunk(chunks[0]), available, refuse=False)
        return _fit_auto(budget, available, _with_larger(chunks, budget, room) if large and not fixed else chunks)
    wanted = budget.experts if isinstance(expert_memory, str) else min(expert_memory, budget.experts)
    left = available - budget.trunk - budget.kv - wanted
    for chunk in _with_larger(chunks, budget, wanted) if large and not fixed else chunks:
        found = budget.with_chunk(chunk)
        # A size that is asked for is kept; what a larger chunk takes is left over, and so is the floor.
        if found.transients <= left - (FLOOR_BYTES if chunk == LARGE_CHUNK else 0):
            break
    return Fit(wanted, found)


def _fit_auto(budget: Budget, available: int, chunks: Sequence[int]) -> Fit:
    """The first chunk, from the largest, that takes no more than it leaves to experts."""
    for chunk in chunks:
        found = budget.with_chunk(chunk)
        room = auto_expert_bytes(found, available, refuse=chunk == chunks[-1])
        if room >= min(found.transients, budget.experts) and room > 0:
            break
    return Fit(min(room, budget.experts), found)


def _with_larger(chunks: Sequence[int], budget: Budget, room: int) -> Sequence[int]:
    """A larger chunk than usual reads each absent expert half as often in a long prompt, and takes the place of some:
    it is worth that where these are few beside both the resident and the absent ones."""
    more = 20 * budget.with_chunk(LARGE_CHUNK).transients
    worth = budget.context >= LARGE_CHUNK and more <= min(room, budget.experts - room)
    return (LARGE_CHUNK, *chunks) if worth else chunks


def auto_expert_bytes(budget: Budget, available: int, refuse: bool = True) -> int:
    """Bytes of experts that `--expert-memory auto` keeps in `available` free bytes. Where not even the rest of the
    model fits they are below 1, or with `refuse` a MimoError."""
    # On a small or busy machine the floor is a wish; without the model's other parts nothing runs.
    floor = min(max(FLOOR_BYTES, available // 10), available // 2)
    room = available - floor - budget.besides
    if refuse and room < max(1, budget.slot_bytes):
        raise MimoError(
            f"{format_size(available)} of memory are free; {format_size(budget.besides)} are needed before the first "
            f"expert, and {format_size(floor)} are left to the system: close other programs, or set --expert-memory "
            "yourself"
        )
    return room
