"""`python -m mlx_mimo.replay`: the hit rates of other policies and budgets on a recorded routing trace."""

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .arguments import positive_int, run
from .errors import MimoError, UsageError
from .experts.policy import DEFAULT_HALF_LIFE_TOKENS
from .experts.simulate import REPLAY_POLICIES, Result, needs_of, shuffled, simulate
from .experts.trace import Trace, read_trace
from .units import parse_size


@dataclass(frozen=True)
class ReplayRow:
    """One line of the table: a policy at a budget, on the trace and on its shuffled control."""

    budget: str  # as it was given
    slots: int
    resident: float  # share of all experts that fit
    result: Result
    control: Result
    routed_per_second: float


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mlx_mimo replay",
        description="Hit rates of a routing trace (recorded with --trace) for policies and budgets. belady knows the "
        "future: no choice of who leaves can hit more. The control is the same trace with each layer's calls shuffled.",
    )
    parser.add_argument("trace", metavar="FILE", help="a trace that --trace recorded")
    parser.add_argument(
        "--expert-memory",
        metavar="SIZES",
        default="5%,10%,25%,50%",
        help="comma-separated sizes such as 8GB, or shares of all experts such as 25%% (default: 5%%,10%%,25%%,50%%)",
    )
    parser.add_argument(
        "--policy",
        metavar="NAMES",
        default=",".join(REPLAY_POLICIES),
        help=f"comma-separated, of {', '.join(REPLAY_POLICIES)} (default: all)",
    )
    parser.add_argument("--slot-bytes", metavar="SIZE", help="bytes of an expert (default: as recorded in the trace)")
    parser.add_argument(
        "--half-life",
        metavar="TOKENS",
        type=positive_int,
        default=int(DEFAULT_HALF_LIFE_TOKENS),
        help="of LFU's use counts (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the shuffled control (default: 0)")
    parser.add_argument("--plot", metavar="FILE", help="write a plot of hit rate against budget (.png, .svg, .pdf)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    return parser


def replay(args: argparse.Namespace) -> int:
    """Runs the command; returns its exit status. Raises UsageError for wrong arguments, MimoError for wrong files."""
    policies = [name.strip() for name in args.policy.split(",")]
    unknown = next((name for name in policies if name not in REPLAY_POLICIES), None)
    if unknown is not None:
        raise UsageError(f"--policy: {unknown!r}; one of {', '.join(REPLAY_POLICIES)} expected")
    trace = read_trace(args.trace)
    if not trace.routed:
        raise MimoError(f"{Path(args.trace).name}: the trace holds no calls; record one with --trace")
    slot_bytes = parse_size(args.slot_bytes) if args.slot_bytes else trace.slot_bytes
    budgets = [(text, slots_of(text, trace, slot_bytes)) for text in args.expert_memory.split(",")]
    rows = measure(trace, policies, budgets, args.half_life, args.seed)
    if args.json:
        print(json.dumps(report(trace, slot_bytes, rows)))
    else:
        print_table(Path(args.trace).name, trace, rows)
    if args.plot:
        plot(Path(args.plot), Path(args.trace).name, rows)
    return 0


def slots_of(text: str, trace: Trace, slot_bytes: int) -> int:
    """The slots of a budget, which is a size or a share of all experts: one at least, all experts at most.

    Raises UsageError for a budget that is neither, and for a size where `slot_bytes` is 0.
    """
    text, every = text.strip(), len(trace.layers) * trace.num_experts
    if text.endswith("%"):
        try:
            share = float(text[:-1]) / 100
        except ValueError:
            share = -1.0
        if not 0 < share <= 1:
            raise UsageError(f"--expert-memory: {text!r}; a share above 0% and up to 100% expected")
        return max(1, round(share * every))
    if not slot_bytes:
        raise UsageError("--expert-memory: the trace does not say how large an expert is; give --slot-bytes")
    return max(1, min(every, parse_size(text) // slot_bytes))


def measure(
    trace: Trace, policies: list[str], budgets: list[tuple[str, int]], half_life: float, seed: int
) -> list[ReplayRow]:
    """Every policy at every budget, budget by budget."""
    control = shuffled(trace, seed)
    needs, control_needs = needs_of(trace), needs_of(control)
    every, rows = len(trace.layers) * trace.num_experts, []
    for budget, slots in budgets:
        for policy in policies:
            began = time.perf_counter()
            result = simulate(trace, policy, slots, half_life, needs)
            rate = trace.routed / (time.perf_counter() - began)
            baseline = simulate(control, policy, slots, half_life, control_needs)
            rows.append(ReplayRow(budget.strip(), slots, slots / every, result, baseline, rate))
    return rows


def print_table(name: str, trace: Trace, rows: list[ReplayRow]) -> None:
    """Prints the rows; `name` is the trace file's."""
    print(
        f"{name}: {len(trace.calls):,} calls of {len(trace.layers)} layers, {trace.routed:,} routed experts, "
        f"{trace.num_experts} experts a layer, top {trace.top_k}"
    )
    print(
        f"{'memory':>10} {'slots':>7} {'resident':>8}  {'policy':<7} {'hit rate':>8} {'shuffled':>8} {'routed/s':>10}"
    )
    for row in rows:
        print(
            f"{row.budget:>10} {row.slots:>7,} {row.resident:>8.1%}  {row.result.policy:<7} "
            f"{row.result.hit_rate:>8.2%} {row.control.hit_rate:>8.2%} {row.routed_per_second:>10,.0f}"
        )


def report(trace: Trace, slot_bytes: int, rows: list[ReplayRow]) -> dict[str, Any]:
    """The object that --json prints."""
    return {
        "layers": len(trace.layers),
        "num_experts": trace.num_experts,
        "top_k": trace.top_k,
        "slot_bytes": slot_bytes,
        "calls": len(trace.calls),
        "routed": trace.routed,
        "rows": [
            {
                "expert_memory": row.budget,
                "slots": row.slots,
                "policy": row.result.policy,
                "hits": row.result.hits,
                "misses": row.result.misses,
                "evictions": row.result.evictions,
                "hit_rate": row.result.hit_rate,
                "shuffled_hit_rate": row.control.hit_rate,
                "routed_per_second": row.routed_per_second,
            }
            for row in rows
        ],
    }


def plot(path: Path, name: str, rows: list[ReplayRow]) -> None:
    """Writes a plot of hit rate against budget. Raises MimoError without matplotlib, or where it cannot be written."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        raise MimoError("--plot needs matplotlib: pip install 'mlx-mimo[plot]'") from None
    figure, axes = plt.subplots(figsize=(6.4, 4.2))
    for policy in dict.fromkeys(row.result.policy for row in rows):
        mine = sorted((row for row in rows if row.result.policy == policy), key=lambda row: row.slots)
        shares = [100 * row.resident for row in mine]
        (line,) = axes.plot(shares, [100 * row.result.hit_rate for row in mine], marker="o", label=policy)
        axes.plot(shares, [100 * row.control.hit_rate for row in mine], ":", color=line.get_color())
    axes.set(xlabel="experts resident, %", ylabel="hit rate, %", title=name, ylim=(0, 100))
    axes.legend(title="dotted: shuffled")
    axes.grid(alpha=0.3)
    try:
        figure.savefig(path, dpi=150, bbox_inches="tight")
    except (OSError, ValueError) as error:
        raise MimoError(f"{path}: plot cannot be written: {error}") from error
    plt.close(figure)


def main() -> int:
    args = build_parser().parse_args()
    return run(lambda: replay(args), computes=False)


if __name__ == "__main__":
    raise SystemExit(main())
