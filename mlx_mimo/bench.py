"""`python -m mlx_mimo.bench`: decode and prefill against prompt length, context depth and expert memory."""

import argparse
import contextlib
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from .arguments import non_negative_int, positive_int, run
from .errors import MimoError, UsageError
from .runtime.budget import format_size, parse_size, parse_speed

SCHEMA_VERSION = 1
OURS, PEER = "mlx-mimo", "mlx-lm"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mlx_mimo bench",
        description="Times prefill and decode for every combination of expert memory, prompt length and context depth. "
        "All runs of a combination compute the same tokens; medians with the least and the most are shown.",
    )
    subject = parser.add_mutually_exclusive_group()
    subject.add_argument("--model", metavar="DIR_OR_REPO", help="converted directory or Hub repo (default: the demo)")
    subject.add_argument(
        "--synthetic",
        metavar="SIZE",
        help="random weights of this size instead, with the released model's widths and fewer layers and experts",
    )
    parser.add_argument(
        "--narrow",
        type=int,
        choices=(1, 2, 4),
        default=1,
        help="divide the synthetic model's widths, for more experts in the same size (default: 1)",
    )
    parser.add_argument("--recipe", metavar="NAME", help="of the synthetic model (default: 4bit)")
    parser.add_argument("--prompt-tokens", metavar="N,…", default="256", type=counts, help="(default: 256)")
    parser.add_argument(
        "--context", metavar="N,…", default="0", type=depths, help="tokens before the prompt (default: 0)"
    )
    parser.add_argument("--generation-tokens", metavar="N", default=32, type=positive_int, help="(default: 32)")
    parser.add_argument(
        "--expert-memory",
        metavar="SIZE,…",
        default="auto",
        help="sizes, shares such as 25%%, auto, all (default: auto)",
    )
    parser.add_argument("--expert-policy", choices=("lfu", "lru"), default="lfu", help="(default: lfu)")
    parser.add_argument("--text", metavar="FILE", help="take the tokens from this text (default: random tokens)")
    parser.add_argument("--repeats", metavar="N", default=3, type=positive_int, help="(default: 3)")
    parser.add_argument("--warmup", metavar="N", default=1, type=non_negative_int, help="runs not counted (default: 1)")
    parser.add_argument("--disk-limit", metavar="SPEED", help="hold reads back to this speed, such as 1GB/s")
    parser.add_argument(
        "--against", choices=(PEER,), help="time unmodified mlx-lm too, in its own process, alternating run by run"
    )
    parser.add_argument("--threads", metavar="N", type=positive_int, help="CPU threads (default: all cores)")
    parser.add_argument("--seed", type=int, default=0, help="of random tokens and weights (default: 0)")
    parser.add_argument("--output", metavar="FILE", help="write the JSON there as well")
    parser.add_argument("--plot", metavar="FILE", help="write a plot (.png, .svg, .pdf)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    return parser


def counts(text: str) -> list[int]:
    return [positive_int(part) for part in text.split(",")]


def depths(text: str) -> list[int]:
    return [non_negative_int(part) for part in text.split(",")]


@dataclass(frozen=True)
class Row:
    """One system at one expert memory on one case, over all repeats."""

    system: str
    expert_memory: str
    slots: int | None
    resident: float  # share of all experts
    prompt_tokens: int
    context: int
    generation_tokens: int
    prefill_tps: dict
    decode_tps: dict
    prefill_hit_rate: float | None
    decode_hit_rate: float | None
    disk_bytes_per_token: float | None
    decode_read_share: float | None  # of the time, in which at least one read was running
    prefill_read_share: float | None
    samples: list


def bench(args: argparse.Namespace) -> int:
    for part in args.expert_memory.split(","):
        if part not in ("auto", "all") and not part.endswith("%"):
            parse_size(part)
    limit = parse_speed(args.disk_limit) if args.disk_limit else None
    if args.recipe and not args.synthetic:
        raise UsageError("--recipe: goes with --synthetic only; a directory has its own")
    if args.narrow != 1 and not args.synthetic:
        raise UsageError("--narrow: goes with --synthetic only")
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(_subject(args))
        rows = list(_measure(args, directory, limit))
    report = {
        "schema_version": SCHEMA_VERSION,
        "command": shlex.join(["mlx_mimo", "bench", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: version(name) for name in ("mlx", "mlx-lm", "mlx-mimo")},
        "disk_limit_bytes_per_s": limit,
        "rows": [asdict(row) for row in rows],
    }
    if args.output:
        _write(Path(args.output), json.dumps(report, indent=1))
    if args.json:
        print(json.dumps(report))
    else:
        print_table(report, rows)
    if args.plot:
        plot(Path(args.plot), rows)
    return 0


@contextlib.contextmanager
def _subject(args: argparse.Namespace) -> Iterator[Path]:
    """The directory that is timed; a synthetic one is gone afterwards."""
    from .runtime.source import find

    if not args.synthetic:
        yield find(args.model).path
        return
    from .runtime.synthetic import parameters, synthetic_config, write_synthetic

    recipe = args.recipe or "4bit"
    config = synthetic_config(parse_size(args.synthetic), recipe, args.narrow)
    with tempfile.TemporaryDirectory(prefix="mlx-mimo-bench-") as folder:
        directory = Path(folder) / f"synthetic-{recipe}"
        write_synthetic(directory, config, recipe, args.seed)
        size = sum(file.stat().st_size for file in directory.iterdir())
        print(
            f"synthetic: {config['num_hidden_layers']} layers, {config['n_routed_experts']} experts in each MoE layer, "
            f"{format_size(size)}, {parameters(config) / 1e9:.2f} billion parameters",
            file=sys.stderr,
        )
        yield directory


def _measure(args: argparse.Namespace, directory: Path, limit: float | None) -> Iterator[Row]:
    import mlx.core as mx

    from .runtime.load import load
    from .runtime.throttle import Throttle
    from .runtime.timing import Case, run_case

    cases = [Case(prompt, depth, args.generation_tokens) for depth in args.context for prompt in args.prompt_tokens]
    most = max(case.tokens for case in cases)
    with contextlib.ExitStack() as stack:
        peer = stack.enter_context(Peer(directory)) if args.against else None
        for wanted in args.expert_memory.split(","):
            model, tokenizer = load(
                directory,
                expert_memory=_memory(wanted, directory),
                expert_policy=args.expert_policy,
                threads=args.threads,
                progress=sys.stderr.isatty(),
            )
            try:
                if limit is not None:
                    if model.residency is None or model.residency.all_resident:
                        raise UsageError(f"--disk-limit: at --expert-memory {wanted} nothing is read while it runs")
                    model.residency.reader._preadv = Throttle(limit)
                tokens = _tokens(args, model, tokenizer, most)
                for case in cases:
                    ours, theirs = [], []
                    for turn in range(args.warmup + args.repeats):
                        sample = run_case(model, case, tokens)
                        other = peer.run(case, tokens) if peer else None
                        if turn >= args.warmup:
                            ours.append(sample)
                            theirs.append(other)
                    yield _row(OURS, wanted, model, case, ours)
                    if peer:
                        yield _row(PEER, "all", None, case, theirs)
            finally:
                if model.residency is not None:
                    model.residency.close()
            del model
            mx.clear_cache()


def _memory(text: str, directory: Path) -> str | int:
    """What `load` takes; a share becomes bytes of slots."""
    if not text.endswith("%"):
        return text if text in ("auto", "all") else parse_size(text)
    from .models.config import ModelArgs
    from .runtime.budget import measure
    from .runtime.load import on_cpu
    from .runtime.source import read_config

    try:
        share = float(text[:-1]) / 100
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise UsageError(f"--expert-memory: {text!r}; a share above 0% and up to 100% expected")
    item_bytes = 4 if on_cpu() else 2
    args = ModelArgs.from_dict(read_config(directory))
    budget = measure(directory, args, 1, 1, item_bytes, item_bytes)
    return max(budget.slot_bytes, int(share * budget.num_experts) * budget.slot_bytes)


def _tokens(args: argparse.Namespace, model, tokenizer, most: int) -> list[int]:
    if args.text is None:
        import numpy as np

        return np.random.default_rng(args.seed).integers(0, model.args.vocab_size, most).tolist()
    try:
        ids = tokenizer.encode(Path(args.text).read_text(encoding="utf-8"), add_special_tokens=False)
    except (OSError, ValueError) as error:
        raise UsageError(f"--text: {args.text} cannot be read: {error}") from None
    if len(ids) < most:
        raise UsageError(f"--text: {args.text} has {len(ids):,} tokens, {most:,} are needed for these cases")
    return list(ids[:most])


def _row(system: str, memory: str, model, case, samples: Sequence) -> Row:
    from .runtime.timing import Spread

    slots, resident = None, 1.0
    residency = getattr(model, "residency", None)
    if residency is not None:
        slots = residency.counters.slots
        resident = slots / sum(file.num_experts for file in residency.files.values())
    decoded = max(case.generation_tokens - 1, 1)  # the first token is prefill's

    def ratio(over: float, under: float) -> float | None:
        return over / under if under else None

    def total(name: str) -> float:
        return sum(getattr(sample, name) for sample in samples)

    streamed = residency is not None and not residency.all_resident
    return Row(
        system,
        memory,
        slots,
        resident,
        case.prompt_tokens,
        case.depth,
        case.generation_tokens,
        asdict(Spread.of([case.prompt_tokens / sample.prefill_s for sample in samples])),
        asdict(Spread.of([decoded / max(sample.decode_s, 1e-9) for sample in samples])),
        ratio(total("prefill_hits"), total("prefill_hits") + total("prefill_misses")) if streamed else None,
        ratio(total("decode_hits"), total("decode_hits") + total("decode_misses")) if streamed else None,
        total("decode_bytes") / (decoded * len(samples)) if streamed else None,
        ratio(total("decode_read_s"), total("decode_s")) if streamed else None,
        ratio(total("prefill_read_s"), total("prefill_s")) if streamed else None,
        [asdict(sample) for sample in samples],
    )


class Peer:
    """Unmodified mlx-lm with the same directory, all of it resident, in its own process."""

    def __init__(self, directory: Path):
        self.directory = directory

    def __enter__(self) -> "Peer":
        command = [sys.executable, "-m", "mlx_mimo.runtime.peer", str(self.directory)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._answer()
        return self

    def __exit__(self, *_) -> None:
        self.process.stdin.close()
        self.process.wait()

    def run(self, case, tokens: Sequence[int]):
        from .runtime.timing import Sample, split

        past, prompt, following = split(case, tokens)
        self.process.stdin.write(json.dumps({"past": past, "prompt": prompt, "following": following}) + "\n")
        self.process.stdin.flush()
        return Sample(**self._answer())

    def _answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise MimoError(f"--against {PEER}: its process ended with {self.process.wait()}; see its error above")
        return json.loads(line)


def print_table(report: dict, rows: list[Row]) -> None:
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    print(f"{report['machine']}; {versions}; {report['date']}")
    if report["disk_limit_bytes_per_s"]:
        print(f"reads held back to {format_size(int(report['disk_limit_bytes_per_s']))}/s")
    print(
        f"{'system':<9}{'memory':>9}{'resident':>9}{'context':>8}{'prompt':>7}  {'prefill tok/s':<23}"
        f"{'decode tok/s':<22}{'hits':>6}{'read/token':>11}{'reading':>8}"
    )
    for row in rows:
        hits = "" if row.decode_hit_rate is None else f"{row.decode_hit_rate:.1%}"
        read = "" if row.disk_bytes_per_token is None else format_size(int(row.disk_bytes_per_token))
        share = "" if row.decode_read_share is None else f"{row.decode_read_share:.0%}"
        print(
            f"{row.system:<9}{row.expert_memory:>9}{row.resident:>9.1%}{row.context:>8}{row.prompt_tokens:>7}  "
            f"{_spread(row.prefill_tps):<23}{_spread(row.decode_tps):<22}{hits:>6}{read:>11}{share:>8}"
        )


def _spread(figures: dict) -> str:
    return f"{figures['median']:.1f} ({figures['least']:.1f}–{figures['most']:.1f})"


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise MimoError(f"{path}: cannot be written: {error.strerror or error}") from error


def plot(path: Path, rows: list[Row]) -> None:
    """Decode speed against what varies most among memory, context and prompt; prefill against prompt length."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        raise MimoError("--plot needs matplotlib: pip install 'mlx-mimo[plot]'") from None
    axes_of = {
        "experts resident, %": lambda row: 100 * row.resident,
        "context, tokens": lambda row: row.context,
        "prompt, tokens": lambda row: row.prompt_tokens,
    }
    label = max(axes_of, key=lambda name: len({axes_of[name](row) for row in rows if row.system == OURS}))
    place = axes_of[label]
    figure, panels = plt.subplots(1, 2, figsize=(10, 4.2))
    for panel, what in zip(panels, ("decode_tps", "prefill_tps")):
        for system in dict.fromkeys(row.system for row in rows):
            mine = sorted((row for row in rows if row.system == system), key=place)
            middle = [getattr(row, what)["median"] for row in mine]
            below = [getattr(row, what)["median"] - getattr(row, what)["least"] for row in mine]
            above = [getattr(row, what)["most"] - getattr(row, what)["median"] for row in mine]
            panel.errorbar([place(row) for row in mine], middle, [below, above], marker="o", capsize=3, label=system)
        panel.set(xlabel=label, ylabel=f"{what.removesuffix('_tps')}, tokens/s", ylim=(0, None))
        panel.grid(alpha=0.3)
        panel.legend()
    try:
        figure.savefig(path, dpi=150, bbox_inches="tight")
    except (OSError, ValueError) as error:
        raise MimoError(f"{path}: plot cannot be written: {error}") from error
    plt.close(figure)


def main() -> int:
    args = build_parser().parse_args()
    return run(lambda: bench(args))


if __name__ == "__main__":
    raise SystemExit(main())
