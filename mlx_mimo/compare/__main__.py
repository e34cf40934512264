"""`python -m mlx_mimo.compare`: how far two directories' predictions are apart on a text."""

import argparse
import json
import shutil
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from ..arguments import add_thread_arguments, expert_memory, positive_int, run
from ..errors import MimoError, UsageError
from ..units import format_size

SCHEMA_VERSION = 1


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mlx_mimo compare",
        description="KL divergence, agreement and perplexity of two directories on a text. They are loaded one after "
        "the other, so neither needs room for the other, and with streamed experts neither needs to fit.",
    )
    parser.add_argument("a", metavar="DIR_A", help="the reference: the one that is trusted")
    parser.add_argument("b", metavar="DIR_B", help="the one that is judged")
    parser.add_argument("--text", metavar="FILE", required=True, help="what both read, UTF-8")
    parser.add_argument(
        "--max-tokens",
        type=positive_int,
        default=2048,
        help="of the text; each takes 4 bytes × vocabulary in the temporary folder meanwhile, 0.6 MB with the released "
        "model (default: %(default)s)",
    )
    parser.add_argument(
        "--window",
        type=positive_int,
        default=512,
        metavar="TOKENS",
        help="read at once, from an empty cache (default: %(default)s)",
    )
    parser.add_argument(
        "--expert-memory", metavar="SIZE", default="auto", type=expert_memory, help="as in generate (default: auto)"
    )
    add_thread_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the text")
    return parser


def compare(args: argparse.Namespace) -> int:
    text = _read(args.text)
    if args.window < 2:
        raise UsageError("--window: at least 2 tokens expected")
    pieces, vocab = _prepare(args, text)
    import numpy as np

    from .quality import Comparer

    comparer = Comparer()
    with tempfile.TemporaryFile(prefix="mlx-mimo-compare-") as kept:
        experts_a = _run(args, args.a, pieces, _PredictionWriter(kept))
        kept.seek(0)
        experts_b = _run(args, args.b, pieces, _PredictionComparer(kept, comparer, pieces, vocab, np.fromfile))
    result = comparer.result()
    if args.json:
        fields = {"schema_version": SCHEMA_VERSION, "a": args.a, "b": args.b, "text": args.text, "windows": len(pieces)}
        print(json.dumps(fields | asdict(result) | {"experts_a": experts_a, "experts_b": experts_b}))
    else:
        print(f"{result.tokens:,} predicted tokens of {args.text} in windows of {args.window}")
        print(
            f"KL divergence of B from A   mean {result.kl_mean:.5f}, 99 % {result.kl_99:.5f}, max {result.kl_max:.5f}"
        )
        print(f"top-1 agreement             {result.top1_agreement:.2%}")
        print(f"perplexity                  A {result.perplexity_a:.4f}, B {result.perplexity_b:.4f}")
    return 0


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UsageError(f"--text: {path} cannot be read: {error}") from None


def _prepare(args: argparse.Namespace, text: str) -> tuple[list[list[int]], int]:
    """(the text's windows, the vocabulary's size), which both directories share. Checks both before either is loaded,
    since a run of a large model takes long. Raises FormatError, MimoError or UsageError."""
    from ..config.model_args import ModelArgs
    from ..runtime.load import load_tokenizer
    from ..runtime.source import find
    from .quality import windows

    found = [find(name) for name in (args.a, args.b)]
    for directory in found:
        directory.check()
    a, b = [ModelArgs.from_dict(directory.config).vocab_size for directory in found]
    if a != b:
        raise MimoError(f"{args.b}: vocabulary of {b:,}, {a:,} in {args.a}: their predictions cannot be compared")
    ids = [load_tokenizer(directory).encode(text, add_special_tokens=False) for directory in found]
    if ids[0] != ids[1]:
        raise MimoError(f"{args.a} and {args.b} have different tokenizers: their tokens cannot be compared")
    pieces = windows(ids[0], args.window, args.max_tokens)
    if not pieces:
        raise UsageError(f"--text: {args.text}: at least two tokens expected")
    need, free = 4 * a * sum(len(piece) - 1 for piece in pieces), shutil.disk_usage(tempfile.gettempdir()).free
    if need > free:
        raise MimoError(_no_room(f"{format_size(need)} are needed for A's predictions, {format_size(free)} are free"))
    return pieces, a


def _no_room(what: str) -> str:
    return f"{tempfile.gettempdir()}: {what}; give a smaller --max-tokens, or another folder in TMPDIR"


def _run(args: argparse.Namespace, directory: str, pieces: list[list[int]], each) -> dict | None:
    """Runs one model over the text, calls `each` with its predictions and frees it. Returns the counters of expert
    residency, or None where experts are stacked."""
    from ..runtime.load import load
    from .quality import predictions

    model, _ = load(
        directory,
        expert_memory=args.expert_memory,
        threads=args.threads,
        reader_threads=args.reader_threads,
        progress=sys.stderr.isatty(),
    )
    try:
        predictions(model, pieces, each)
        counters = model.residency.counters if model.residency else None
        return asdict(counters) | {"hit_rate": counters.hit_rate} if counters else None
    finally:
        if model.residency:
            model.residency.close()


class _PredictionWriter:
    """Writes model A's log-probabilities to a file."""

    def __init__(self, file):
        self.file = file

    def __call__(self, rows) -> None:
        try:
            rows.tofile(self.file)
        except OSError as error:
            raise MimoError(_no_room(error.strerror or str(error))) from error


class _PredictionComparer:
    """Compares model B's log-probabilities with the ones in the file."""

    def __init__(self, file, comparer, pieces: list[list[int]], vocab: int, fromfile):
        self.file, self.comparer, self.vocab, self.fromfile = file, comparer, vocab, fromfile
        self.left = iter(pieces)

    def __call__(self, rows) -> None:
        piece = next(self.left)
        a = self.fromfile(self.file, rows.dtype, len(rows) * self.vocab).reshape(-1, self.vocab)
        self.comparer.add(a, rows, piece[1:])


def main() -> int:
    args = build_parser().parse_args()
    return run(lambda: compare(args))


if __name__ == "__main__":
    raise SystemExit(main())
