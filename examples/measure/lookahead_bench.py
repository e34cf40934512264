"""Measures whether look-ahead gains: decodes the same tokens with and without it, at several disk speeds.

    python examples/measure/lookahead_bench.py [--model DIR | --synthetic 1GB] [--disk-limits 20MB/s,100MB/s]

The demo model by default, on its held-out questions; --synthetic generates random weights of the released model's shape
instead. Reads are held back to each speed (the page cache answers them), runs with and without take turns.
"""

import argparse
import contextlib
import json
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import mlx.core as mx
import numpy as np

import mlx_mimo
from mlx_mimo.bench.synthetic import synthetic_config, write_synthetic
from mlx_mimo.bench.throttle import Throttle
from mlx_mimo.units import parse_size, parse_speed


def text_tokens(tokenizer, count: int) -> list[int]:
    """Returns the first `count` tokens of the demo's held-out questions and answers."""
    ids: list[int] = []
    lines = (Path(mlx_mimo.__file__).parent / "demo" / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    for line in lines[::7]:
        item = json.loads(line)
        messages = [*item["messages"], {"role": "assistant", "content": item["answer"]}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, enable_thinking=False)
        ids += tokenizer.encode(text, add_special_tokens=False)
    return ids[:count]


def decode(model, tokens: list[int], skip: int) -> float:
    """Returns seconds per token, without the first `skip` tokens."""
    cache = model.make_cache()
    for step, token in enumerate(tokens):
        if step == skip:
            began = time.perf_counter()
        mx.eval(model(mx.array([[token]]), cache))
    return (time.perf_counter() - began) / (len(tokens) - skip)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a converted directory (default: the demo)")
    parser.add_argument("--synthetic", metavar="SIZE")
    parser.add_argument("--narrow", type=int, choices=(1, 2, 4), default=4)
    parser.add_argument("--resident", default="25,50", help="percent of the experts")
    parser.add_argument("--disk-limits", default="5MB/s,20MB/s")
    parser.add_argument("--tokens", type=int, default=120)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    with contextlib.ExitStack() as stack:
        directory = args.model
        if args.synthetic:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "model"
            write_synthetic(directory, synthetic_config(parse_size(args.synthetic), "4bit", args.narrow), "4bit")
        model, tokenizer = mlx_mimo.load(directory, expert_memory="all")
        slots, slot_bytes = model.residency.counters.slots, model.residency.counters.slot_bytes
        model.residency.close()
        del model
        if args.synthetic:
            tokens = np.random.default_rng(0).integers(2, 4000, args.tokens).tolist()
        else:
            tokens = text_tokens(tokenizer, args.tokens)
        print("| disk | resident | ms a token | with look-ahead | change | hits | with | guesses read | used |")
        print("|---|---|---|---|---|---|---|---|---|")
        for limit in args.disk_limits.split(","):
            for percent in args.resident.split(","):
                compare(directory, limit, int(percent), slots * slot_bytes * int(percent) // 100, tokens, args.rounds)


def compare(directory, limit: str, percent: int, nbytes: int, tokens: list[int], rounds: int) -> None:
    seconds: dict[bool, list[float]] = {False: [], True: []}
    counters = {}
    for turn in range(2 * rounds):
        lookahead = turn % 4 in (1, 2)
        model, _ = mlx_mimo.load(directory, expert_memory=nbytes, lookahead=lookahead)
        model.residency.reader._preadv = Throttle(parse_speed(limit))
        seconds[lookahead].append(decode(model, tokens, skip=len(tokens) // 4))
        counters[lookahead] = model.residency.counters
        model.residency.close()
    off, on = (1e3 * statistics.median(seconds[lookahead]) for lookahead in (False, True))
    guessed, used = counters[True].lookahead_reads, counters[True].lookahead_used
    print(
        f"| {limit} | {percent} % | {off:.1f} | {on:.1f} | {on / off - 1:+.0%} | {counters[False].hit_rate:.0%} | "
        f"{counters[True].hit_rate:.0%} | {guessed:,} | {used / max(guessed, 1):.0%} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
