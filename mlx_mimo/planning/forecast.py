"""How fast a model will be on a machine, from its budget in bytes: slots and speeds, each with its range. No MLX.

A decoded token costs

    (trunk + experts + KV read from memory) / bandwidth + layers that wait for the router + missed bytes / disk

and a prefill chunk the slower of its arithmetic and of reading each expert that is not resident once. Every constant
here is an assumption that `plan` prints; docs/PERFORMANCE.md says how far forecasts were off where it was measured.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from ..config.model_args import ModelArgs
from ..errors import MimoError
from ..units import format_size
from .budget import Budget, Fit, fit
from .machine import Machine


@dataclass(frozen=True)
class Range:
    """A figure and how far off it may be."""

    low: float
    expected: float
    high: float


# (share of experts resident, hit rate while decoding: low, expected, high). Others measured 64–71 % at 12.5 % and
# 80–87 % at 25 % on a model of the same expert geometry, 29 % for a decayed LFU at 3 % (5 % for LRU). The row at half
# lies between its neighbours: the one published figure there, 83 %, is of another model and below this one's at a
# quarter.
HIT_RATES: Sequence[tuple[float, float, float, float]] = (
    (0.0, 0.0, 0.0, 0.0),
    (0.031, 0.05, 0.25, 0.35),
    (0.125, 0.64, 0.675, 0.71),
    (0.25, 0.80, 0.835, 0.87),
    (0.50, 0.88, 0.925, 0.95),
    (0.75, 0.95, 0.97, 0.985),
    (1.0, 1.0, 1.0, 1.0),
)
BANDWIDTH_USED = Range(0.45, 0.60, 0.75)  # share of the memory's bandwidth that decoding reaches on a GPU
CPU_BANDWIDTH_USED = Range(0.55, 0.80, 0.95)  # on a CPU, of what a copy reaches: see docs/PERFORMANCE.md
DISK_USED = Range(0.70, 0.85, 1.0)  # share of the disk's speed that reads of single experts reach
ROUTER_WAIT = Range(300e-6, 150e-6, 70e-6)  # seconds a layer loses where the host waits for its router
OPERATIONS_PER_BYTE = Range(10.0, 17.0, 25.0)  # prefill's operations a second for each byte a second of bandwidth


@dataclass(frozen=True)
class Forecast:
    """How a model runs with a number of slots. Of a Range of speeds, low is the slowest."""

    expert_bytes: int  # of slots
    slots: int
    share: float  # of all experts
    hit_rate: Range
    memory_bytes_per_token: int  # trunk, experts and KV at full context
    disk_bytes_per_token: Range  # low is the fewest
    decode_tps: Range
    prefill_tps: Range
    total_bytes: int  # in memory, KV and transients included

    @property
    def all_resident(self) -> bool:
        return self.share >= 1.0


def bandwidth_used(machine: Machine) -> Range:
    """Share of the machine's memory bandwidth that decoding reaches."""
    return CPU_BANDWIDTH_USED if machine.backend == "cpu" else BANDWIDTH_USED


def hit_rate(share: float) -> Range:
    """The hit rate of decoding that is expected with a share of the experts resident."""
    place = min(bisect_right([row[0] for row in HIT_RATES], share), len(HIT_RATES) - 1)
    below, above = HIT_RATES[place - 1], HIT_RATES[place]
    part = (share - below[0]) / (above[0] - below[0])
    return Range(*(a + part * (b - a) for a, b in zip(below[1:], above[1:])))


def fit_on(budget: Budget, machine: Machine, expert_memory: str | int = "auto", streamed: bool = True) -> Fit:
    """The Fit that `load` would choose on a machine. Stacked experts (`streamed=False`) must all fit.

    Raises MimoError where the model does not fit.
    """
    found = fit(budget, machine.available, expert_memory, streamed, large=machine.backend != "cpu")
    needed = found.budget.non_expert_bytes + found.expert_bytes
    if needed > machine.available:
        what = (
            f"--expert-memory asks for {format_size(found.expert_bytes)}"
            if isinstance(expert_memory, int)
            else f"all experts {'' if streamed else '(stacked ones must all be resident) '}take "
            f"{format_size(found.expert_bytes)}"
        )
        raise MimoError(
            f"{format_size(machine.available)} of memory are free; {what}, and "
            f"{format_size(found.budget.non_expert_bytes)} are needed besides"
        )
    return found


def forecast(
    args: ModelArgs,
    budget: Budget,
    machine: Machine,
    expert_bytes: int,
    chunk: int,
    hits: Range | None = None,
) -> Forecast:
    """The forecast with `expert_bytes` of slots. `hits`, known from a trace, replaces the assumed hit rates.

    Raises MimoError where `expert_bytes` holds no expert.
    """
    slots = min(budget.num_experts, expert_bytes // max(budget.slot_bytes, 1))
    if slots < 1:
        raise MimoError(f"expert memory of {expert_bytes:,} bytes holds no expert of {budget.slot_bytes:,} bytes")
    share = slots / budget.num_experts
    hits = hits or hit_rate(share)
    layers = len(args.moe_layers)
    wanted = layers * args.num_experts_per_tok
    from_memory = budget.trunk - budget.embedding + wanted * budget.slot_bytes + budget.kv

    def missed(rate: float) -> float:
        return wanted * budget.record_bytes * (1 - rate)

    def decode(rate: float, bandwidth: float, disk: float, wait: float) -> float:
        waits = 0.0 if share >= 1 and machine.backend != "cpu" else wait * layers
        return 1 / (from_memory / (machine.bandwidth * bandwidth) + waits + missed(rate) / (machine.disk * disk))

    # Every expert is needed by some token of a chunk, unless the chunk is short.
    touched = 1 - (1 - args.num_experts_per_tok / args.n_routed_experts) ** chunk
    to_read = max(0.0, touched - share) * budget.num_experts * budget.record_bytes
    weights = _active_parameters(args)

    def prefill(operations: float, disk: float) -> float:
        computing = 2 * weights * chunk / (machine.bandwidth * operations)
        return chunk / max(computing, to_read / (machine.disk * disk))

    pick, used = ("low", "expected", "high"), bandwidth_used(machine)
    return Forecast(
        slots * budget.slot_bytes,
        slots,
        share,
        hits,
        from_memory,
        Range(missed(hits.high), missed(hits.expected), missed(hits.low)),
        Range(*(decode(*(getattr(r, p) for r in (hits, used, DISK_USED, ROUTER_WAIT))) for p in pick)),
        Range(*(prefill(getattr(OPERATIONS_PER_BYTE, p), getattr(DISK_USED, p)) for p in pick)),
        budget.everything - budget.experts + slots * budget.slot_bytes,
    )


def _active_parameters(args: ModelArgs) -> int:
    """The number of weights that a prompt's token is multiplied with, without embedding and head."""
    total = 0
    for layer in range(args.num_hidden_layers):
        keys, values = args.head_dims(layer)
        heads, kv_heads = args.heads(layer), args.kv_heads(layer)
        total += args.hidden_size * (heads * (keys + values) + kv_heads * (keys + values))
        inner = args.num_experts_per_tok * args.moe_intermediate_size if args.is_moe(layer) else args.intermediate_size
        total += 3 * args.hidden_size * inner
    return total
