"""`python -m mlx_mimo.compare`: how far two directories' predictions are apart on a text."""

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from .arguments import expert_memory, positive_int, run
from .errors import MimoError, UsageError

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
    parser.add_argument("--max-tokens", type=positive_int, default=2048, help="of the text (default: %(default)s)")
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
    parser.add_argument("--threads", metavar="N", type=positive_int, help="CPU threads (default: all cores)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the text")
    return parser


def compare(args: argparse.Namespace) -> int:
    try:
        text = Path(args.text).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UsageError(f"--text: {args.text} cannot be read: {error}") from None
    if args.window < 2:
        raise UsageError("--window: at least 2 tokens expected")
    import numpy as np

    from .runtime.load import load
    from .runtime.quality import Comparer, predictions, windows

    options = {"expert_memory": args.expert_memory, "threads": args.threads, "progress": sys.stderr.isatty()}

    def read(directory: str, each) -> tuple[list[list[int]], dict | None]:
        """Runs one model over the text; everything of it is gone afterwards."""
        model, tokenizer = load(directory, **options)
        try:
            pieces = windows(tokenizer.encode(text, add_special_tokens=False), args.window, args.max_tokens)
            if not pieces:
                raise UsageError(f"--text: {args.text}: at least two tokens expected")
            each.begin(pieces)
            predictions(model, pieces, each)
            counters = model.residency.counters if model.residency else None
            return pieces, asdict(counters) | {"hit_rate": counters.hit_rate} if counters else None
        finally:
            if model.residency:
                model.residency.close()

    with tempfile.TemporaryFile(prefix="mlx-mimo-compare-") as kept:
        reference = _Kept(kept)
        pieces, experts_a = read(args.a, reference)
        comparer = Comparer()
        judged = _Judged(reference, comparer, pieces, args, np.fromfile)
        _, experts_b = read(args.b, judged)
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


class _Kept:
    """Model A's log-probabilities, on disk until model B is there."""

    def __init__(self, file):
        self.file = file
        self.vocab = 0

    def begin(self, pieces: list[list[int]]) -> None:
        self.pieces = pieces

    def __call__(self, rows) -> None:
        self.vocab = rows.shape[1]
        try:
            rows.tofile(self.file)
        except OSError as error:
            need = rows.nbytes * len(self.pieces)
            raise MimoError(
                f"{tempfile.gettempdir()}: {error.strerror or error}: room for {need:,} bytes "
                "is needed; give a smaller --max-tokens, or another folder in TMPDIR"
            ) from error


class _Judged:
    """Model B's, compared as they come."""

    def __init__(self, reference: _Kept, comparer, pieces: list[list[int]], args: argparse.Namespace, fromfile):
        self.reference, self.comparer, self.pieces, self.args, self.fromfile = (
            reference,
            comparer,
            pieces,
            args,
            fromfile,
        )
        reference.file.seek(0)

    def begin(self, pieces: list[list[int]]) -> None:
        if pieces != self.pieces:
            raise MimoError(
                f"{self.args.a} and {self.args.b} have different tokenizers: their tokens cannot be compared"
            )
        self.left = iter(pieces)

    def __call__(self, rows) -> None:
        piece, vocab = next(self.left), self.reference.vocab
        if rows.shape[1] != vocab:
            raise MimoError(f"{self.args.b}: vocabulary of {rows.shape[1]:,}, {vocab:,} in {self.args.a}")
        a = self.fromfile(self.reference.file, rows.dtype, rows.size).reshape(rows.shape)
        self.comparer.add(a, rows, piece[1:])


def main() -> int:
    args = build_parser().parse_args()
    return run(lambda: compare(args))


if __name__ == "__main__":
    raise SystemExit(main())
