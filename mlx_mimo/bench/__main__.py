"""`python -m mlx_mimo.bench`: decode and prefill against prompt length, context depth and expert memory."""

import argparse
import contextlib
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import version
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from ..arguments import add_thread_arguments, non_negative_int, positive_int, run
from ..errors import MimoError, UsageError
from ..units import format_size, parse_size, parse_speed
from .peer import NAME as PEER
from .peer import Peer, bytes_in_memory

if TYPE_CHECKING:
    from .report import CaseResult

SCHEMA_VERSION = 1


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mlx_mimo bench",
        description="Times prefill and decode for every combination of expert memory, prompt length and context depth. "
        "Each repeat reads tokens of its own, the same at every expert memory; medians with the least and the most are "
        "shown. The columns: hits = share of needed experts that were in memory; read/token = bytes from the files; "
        "reading = share of decode's time in which something was being read; waiting = share in which the model stood "
        "still for it.",
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
    parser.add_argument(
        "--generation-tokens", metavar="N", default=32, type=positive_int, help="at least 2 (default: 32)"
    )
    parser.add_argument(
        "--expert-memory",
        metavar="SIZE,…",
        default="auto",
        help="sizes, shares such as 25%%, auto, all (default: auto)",
    )
    parser.add_argument("--expert-policy", choices=("lfu", "lru"), default="lfu", help="(default: lfu)")
    parser.add_argument(
        "--text", metavar="FILE", help="take the tokens from this text, a piece for each run (default: random tokens)"
    )
    parser.add_argument("--repeats", metavar="N", default=3, type=positive_int, help="(default: 3)")
    parser.add_argument("--warmup", metavar="N", default=1, type=non_negative_int, help="runs not counted (default: 1)")
    parser.add_argument("--disk-limit", metavar="SPEED", help="hold reads back to this speed, such as 1GB/s")
    parser.add_argument(
        "--against",
        choices=(PEER,),
        help="time unmodified mlx-lm too, in its own process, alternating run by run; both copies need to fit",
    )
    add_thread_arguments(parser)
    parser.add_argument("--seed", type=int, default=0, help="of random tokens and weights (default: 0)")
    parser.add_argument("--output", metavar="FILE", help="write the JSON there as well")
    parser.add_argument("--plot", metavar="FILE", help="write a plot (.png, .svg, .pdf)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    return parser


def counts(text: str) -> list[int]:
    """argparse type: whole numbers of at least 1, separated by commas."""
    return [positive_int(part) for part in text.split(",")]


def depths(text: str) -> list[int]:
    """argparse type: whole numbers of at least 0, separated by commas."""
    return [non_negative_int(part) for part in text.split(",")]


def bench(args: argparse.Namespace) -> int:
    limit = parse_speed(args.disk_limit) if args.disk_limit else None
    check(args)
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(_subject(args))
        rows = list(_measure(args, directory, limit))
    from .report import machine_line, plot, print_table

    report = {
        "schema_version": SCHEMA_VERSION,
        "command": shlex.join(["mlx_mimo", "bench", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine_line(),
        "versions": {name: version(name) for name in ("mlx", "mlx-lm", "mlx-mimo")},
        "disk_limit_bytes_per_s": limit,
        "rows": [asdict(row) for row in rows],
    }
    # Printed first: a file that cannot be written then loses no figures.
    if args.json:
        print(json.dumps(report))
    else:
        print_table(report, rows)
    if args.output:
        _write(Path(args.output), json.dumps(report, indent=1))
    if args.plot:
        plot(Path(args.plot), rows)
    return 0


def check(args: argparse.Namespace) -> None:
    """Checks all flags that can be checked before anything is loaded. Raises UsageError or MimoError."""
    for part in args.expert_memory.split(","):
        if part.endswith("%"):
            _share(part)
        elif part not in ("auto", "all"):
            parse_size(part)
    if args.generation_tokens < 2:
        raise UsageError("--generation-tokens: at least 2 expected; the first token belongs to prefill")
    for flag, given in (("--recipe", args.recipe), ("--narrow", args.narrow != 1)):
        if given and not args.synthetic:
            raise UsageError(f"{flag}: goes with --synthetic only")
    if args.text:
        if args.synthetic:
            raise UsageError("--text: a synthetic model knows no words; leave it out, and tokens are random")
        _read(args.text)
    for flag, file in (("--output", args.output), ("--plot", args.plot)):
        if file and not Path(file).resolve().parent.is_dir():
            raise UsageError(f"{flag}: {file}: no such folder")
    if args.plot and find_spec("matplotlib") is None:
        raise MimoError("--plot needs matplotlib: pip install 'mlx-mimo[plot]'")


def _check_length(args: argparse.Namespace, config: dict) -> None:
    longest = max(args.context) + max(args.prompt_tokens) + args.generation_tokens
    limit = config.get("max_position_embeddings", longest)
    if longest > limit:
        raise UsageError(
            f"--context, --prompt-tokens and --generation-tokens come to {longest:,} tokens; "
            f"the model's max_position_embeddings is {limit:,}"
        )


@contextlib.contextmanager
def _subject(args: argparse.Namespace) -> Iterator[Path]:
    """Context manager of the directory that is timed; a synthetic one is written now and deleted at the end."""
    from ..runtime.source import find

    if not args.synthetic:
        found = find(args.model)
        _check_length(args, found.config)
        yield found.path
        return
    from .synthetic import parameters, synthetic_config, write_synthetic

    recipe = args.recipe or "4bit"
    config = synthetic_config(parse_size(args.synthetic), recipe, args.narrow)
    _check_length(args, config)
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


def _measure(args: argparse.Namespace, directory: Path, limit: float | None) -> Iterator["CaseResult"]:
    """Loads the model at each expert memory and runs every case on it; `limit` is the disk's speed in bytes/s."""
    import mlx.core as mx

    from ..runtime.load import load
    from .report import OURS, case_result
    from .throttle import Throttle
    from .timing import Case, run_case

    cases = [Case(prompt, depth, args.generation_tokens) for depth in args.context for prompt in args.prompt_tokens]
    tokens = _tokens(args, directory, [case.tokens for case in cases])
    with contextlib.ExitStack() as stack:
        peer = None
        if args.against:
            _check_room(args, directory)
            peer = stack.enter_context(Peer(directory))
        for wanted in args.expert_memory.split(","):
            model, _ = load(
                directory,
                expert_memory=_memory(wanted, directory),
                expert_policy=args.expert_policy,
                threads=args.threads,
                reader_threads=args.reader_threads,
                progress=sys.stderr.isatty(),
            )
            try:
                if limit is not None:
                    if model.residency is None or model.residency.all_resident:
                        raise UsageError(f"--disk-limit: at --expert-memory {wanted} nothing is read while it runs")
                    model.residency.reader._preadv = Throttle(limit)
                for case, pieces in zip(cases, tokens):
                    ours, theirs = [], []
                    for piece in pieces:
                        ours.append(run_case(model, case, piece))
                        if peer:
                            theirs.append(peer.run(case, piece))
                    yield case_result(OURS, wanted, model, case, ours[args.warmup :])
                    if peer:
                        yield case_result(PEER, "all", None, case, theirs[args.warmup :])
            finally:
                if model.residency is not None:
                    model.residency.close()
            del model
            mx.clear_cache()


def _share(text: str) -> float:
    try:
        share = float(text[:-1]) / 100
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise UsageError(f"--expert-memory: {text!r}; a share above 0% and up to 100% expected")
    return share


def _memory(text: str, directory: Path) -> str | int:
    """The `expert_memory` of `load`; a share becomes the bytes of the nearest whole number of slots of each shape."""
    if not text.endswith("%"):
        return text if text in ("auto", "all") else parse_size(text)
    share = _share(text)
    return max(1, sum(max(1, round(share * count)) * size for count, size in _slots(directory)))


def _slots(directory: Path) -> list[tuple[int, int]]:
    """(number of experts, bytes of a slot) for each expert shape of this directory; empty where experts are stacked."""
    from ..checkpoint.directory import Directory
    from ..experts.banks import slot_bytes
    from ..experts.pool import group_by_shape
    from ..runtime.compute import choose_compute

    files = Directory(directory)
    hidden_size, found = files.config["hidden_size"], []
    for group in group_by_shape(files.expert_files):
        layout = next(iter(group.values())).layout
        size = slot_bytes(layout, choose_compute(layout, hidden_size).widen)
        found.append((sum(file.num_experts for file in group.values()), size))
    return found


def _check_room(args: argparse.Namespace, directory: Path) -> None:
    """Raises MimoError where both copies of the model do not fit into free memory: swapping would be timed then."""
    from ..checkpoint.directory import read_config
    from ..config.model_args import ModelArgs
    from ..planning.budget import item_bytes, measure
    from ..planning.memory import available_memory
    from ..runtime.load import on_cpu, working_set

    longest = max(args.context) + max(args.prompt_tokens) + args.generation_tokens
    budget = measure(directory, ModelArgs.from_dict(read_config(directory)), longest, 1, *item_bytes(on_cpu()))
    experts = sum(count * size for count, size in _slots(directory)) or budget.experts
    asked = [_memory(part, directory) for part in args.expert_memory.split(",")]
    # auto takes what is left, one expert if need be.
    most = max(experts if size == "all" else min(size, experts) if isinstance(size, int) else 0 for size in asked)
    ours, theirs = budget.trunk + budget.kv + most, bytes_in_memory(directory, 4 if on_cpu() else 2) + budget.kv
    free = available_memory(working_set())
    if ours + theirs > free:
        raise MimoError(
            f"--against {PEER}: the whole model in {PEER} takes {format_size(theirs)} and ours beside it "
            f"{format_size(ours)}; {format_size(free)} are free. Give a smaller --expert-memory, time a smaller model, "
            "or leave --against out"
        )


def _tokens(args: argparse.Namespace, directory: Path, sizes: Sequence[int]) -> list[list[list[int]]]:
    """Token ids by case and run. No two runs share a piece of text: a repeated one would find its experts in memory.
    Every expert memory and both systems get the same tokens. Raises UsageError where --text is too short."""
    turns = args.warmup + args.repeats
    if args.text is None:
        import numpy as np

        from ..checkpoint.directory import read_config

        vocab, generator = read_config(directory)["vocab_size"], np.random.default_rng(args.seed)
        return [[generator.integers(0, vocab, size).tolist() for _ in range(turns)] for size in sizes]
    from ..checkpoint.directory import Directory
    from ..runtime.load import load_tokenizer

    tokenizer = load_tokenizer(Directory(directory))
    ids, need = list(tokenizer.encode(_read(args.text), add_special_tokens=False)), turns * sum(sizes)
    if len(ids) < need:
        raise UsageError(
            f"--text: {args.text} has {len(ids):,} tokens; {need:,} are needed, since every run reads a piece of its "
            "own. Give a longer text, fewer --repeats or shorter cases"
        )
    left = iter(ids)
    return [[list(islice(left, size)) for _ in range(turns)] for size in sizes]


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UsageError(f"--text: {path} cannot be read: {error}") from None


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise MimoError(f"{path}: cannot be written: {error.strerror or error}") from error


def main() -> int:
    args = build_parser().parse_args()
    return run(lambda: bench(args))


if __name__ == "__main__":
    raise SystemExit(main())
