"""How far `mlx_mimo plan` is off on this machine: its forecast of decode speed against runs of `mlx_mimo bench`.

    python examples/measure/forecast_check.py [--model DIR | --synthetic SIZE] [--disk-limit SPEED,…]
        [--expert-memory SHARE,…]

1. A model of random weights is written, unless one is named: 252 experts a layer at half the release's widths, its
   router's bias such that some experts are as popular as in real models.
2. `mlx_mimo bench` times it at each share of resident experts with reads held back to each disk speed, which stands in
   for slower disks, and once with everything resident, where the disk has no part.
3. `mlx_mimo.planning.forecast`, which `plan` prints, is asked for the same: this machine's memory bandwidth as `plan`
   measures it, the held-back disk, the same room for experts. Once with the hit rates it assumes, and once with those
   that the run had, which tells an error of the hit curve from one of the times.

The error is forecast / measured - 1. Run it on a machine that does nothing else. The default writes about 5 GB into the
temporary folder and wants twice that in memory: the page cache holds the file while everything is resident.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

from mlx_mimo.checkpoint.directory import read_config
from mlx_mimo.config.model_args import ModelArgs
from mlx_mimo.planning.budget import Budget, measure
from mlx_mimo.planning.forecast import Range, forecast
from mlx_mimo.planning.machine import Machine, this_machine
from mlx_mimo.runtime.source import find
from mlx_mimo.units import format_size, parse_size, parse_speed

CHUNK = 2048
RECIPE, NARROW = "4bit", 2


@dataclass(frozen=True)
class Line:
    """One row of the table: tokens per second, measured and forecast."""

    disk: float | None  # bytes a second; None: nothing is read
    resident: float
    hits: float
    assumed_hits: float
    measured: float
    least: float
    most: float
    plain: Range  # the forecast as plan prints it
    informed: Range  # the same with the run's hit rate

    @property
    def error(self) -> float:
        return self.plain.expected / self.measured - 1

    @property
    def informed_error(self) -> float:
        return self.informed.expected / self.measured - 1

    @property
    def within(self) -> bool:
        """Returns whether the measured speed lies in the range that plan prints."""
        return self.plain.low <= self.measured <= self.plain.high


def compared(row: dict, disk: float | None, args: ModelArgs, budget: Budget, machine: Machine) -> Line:
    """Returns a row of bench's JSON with its forecast; `disk` is None if nothing was read."""
    if disk is not None:
        machine = replace(machine, disk=disk, disk_from="given")
    expert_bytes = budget.experts if row["slots"] is None else row["slots"] * budget.slot_bytes
    hits = 1.0 if row["decode_hit_rate"] is None else row["decode_hit_rate"]
    plain = forecast(args, budget, machine, expert_bytes, CHUNK)
    informed = forecast(args, budget, machine, expert_bytes, CHUNK, Range(hits, hits, hits))
    speed = row["decode_tps"]
    return Line(
        disk,
        row["resident"],
        hits,
        plain.hit_rate.expected,
        speed["median"],
        speed["least"],
        speed["most"],
        plain.decode_tps,
        informed.decode_tps,
    )


def table(lines: Sequence[Line]) -> str:
    rows = [
        "| disk | experts resident | hits, measured (assumed) | decode tok/s, measured | forecast | error "
        "| forecast with measured hits | error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for line in lines:
        disk = "not read" if line.disk is None else f"{format_size(int(line.disk))}/s"
        rows.append(
            f"| {disk} | {line.resident:.1%} | {line.hits:.0%} ({line.assumed_hits:.0%}) "
            f"| {line.measured:.2f} ({line.least:.2f}–{line.most:.2f}) "
            f"| {line.plain.expected:.2f} ({line.plain.low:.2f}–{line.plain.high:.2f}) | {line.error:+.0%} "
            f"| {line.informed.expected:.2f} | {line.informed_error:+.0%} |"
        )
    return "\n".join(rows)


def summary(lines: Sequence[Line]) -> str:
    plain, informed = (median(abs(e) for e in errors) for errors in zip(*((x.error, x.informed_error) for x in lines)))
    inside = sum(line.within for line in lines)
    return (
        f"median error {plain:.0%}, told the hit rate {informed:.0%}; "
        f"{inside} of {len(lines)} runs lie in the range that plan prints"
    )


@contextmanager
def subject(options: argparse.Namespace) -> Iterator[Path]:
    """Context manager: the directory that is timed; a synthetic one is deleted on exit."""
    if options.model is not None:
        yield find(None if options.model == "demo" else options.model).path
        return
    from mlx_mimo.bench.synthetic import synthetic_config, write_synthetic

    config = synthetic_config(parse_size(options.synthetic), RECIPE, NARROW)
    with tempfile.TemporaryDirectory(prefix="mlx-mimo-forecast-") as folder:
        directory = Path(folder) / "synthetic"
        write_synthetic(directory, config, RECIPE)
        print(
            f"synthetic: {config['num_hidden_layers']} layers, {config['n_routed_experts']} experts in each MoE layer",
            file=sys.stderr,
        )
        yield directory


def bench(directory: Path, options: argparse.Namespace, memory: str, disk: str | None) -> dict:
    """Returns bench's report. Each run is a process of its own, so that none affects the next."""
    command = [sys.executable, "-m", "mlx_mimo.bench", "--model", str(directory), "--json"]
    command += ["--expert-memory", memory, "--repeats", str(options.repeats)]
    command += ["--prompt-tokens", str(options.prompt_tokens), "--generation-tokens", str(options.generation_tokens)]
    command += [] if disk is None else ["--disk-limit", disk]
    print(f"bench: {memory}" + (f", {disk}" if disk else ""), file=sys.stderr)
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if result.returncode:
        raise SystemExit(f"bench ended with {result.returncode}; its error stands above")
    return json.loads(result.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="DIR", help="a converted directory, or demo, instead of a synthetic one")
    parser.add_argument("--synthetic", metavar="SIZE", default="4.7GB", help="(default: 4.7GB)")
    parser.add_argument("--disk-limit", metavar="SPEED,…", default="500MB/s,1GB/s,2GB/s", help="(default: %(default)s)")
    parser.add_argument(
        "--expert-memory", metavar="SHARE,…", default="12.5%,25%,50%", help="(default: 12.5%%,25%%,50%%)"
    )
    parser.add_argument("--prompt-tokens", metavar="N", type=int, default=16, help="(default: 16)")
    parser.add_argument("--generation-tokens", metavar="N", type=int, default=32, help="(default: 32)")
    parser.add_argument("--repeats", metavar="N", type=int, default=3, help="(default: 3)")
    parser.add_argument("--json", metavar="FILE", help="write the figures there as well")
    options = parser.parse_args()
    disks = options.disk_limit.split(",")
    for disk in disks:
        parse_speed(disk)
    with subject(options) as directory:
        began = time.perf_counter()
        machine = this_machine()
        args = ModelArgs.from_dict(read_config(directory))
        context = options.prompt_tokens + options.generation_tokens
        budget = measure(directory, args, context, CHUNK, *machine.item_bytes)
        reports = [(None, bench(directory, options, "all", None))]
        reports += [(disk, bench(directory, options, options.expert_memory, disk)) for disk in disks]
        took = time.perf_counter() - began
    lines = [
        compared(row, parse_speed(disk) if disk else None, args, budget, machine)
        for disk, report in reports
        for row in report["rows"]
    ]
    first = reports[0][1]
    versions = ", ".join(f"{name} {number}" for name, number in first["versions"].items())
    print(f"{first['machine']}; {versions}; {first['date']}; {took:.0f} s")
    print(
        f"{len(args.moe_layers)} layers × {args.n_routed_experts} experts of {format_size(budget.slot_bytes)}, "
        f"{args.num_experts_per_tok} a token; memory bandwidth {format_size(int(machine.bandwidth))}/s "
        f"({machine.bandwidth_from})\n"
    )
    print(table(lines) + "\n")
    print(summary(lines))
    if options.json:
        fields = {"machine": asdict(machine), "lines": [asdict(line) for line in lines]}
        Path(options.json).write_text(json.dumps(fields, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
