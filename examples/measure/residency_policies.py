"""Compares LFU, LRU and Belady on synthetic and recorded routing; the default half-life comes from here.

    python examples/measure/residency_policies.py [--half-life 64,128,256] [--demo 60] [--trace FILE ...]

Three kinds of routing at the full model's 256 experts, 8 of them a token:

- zipf: each layer has its favourites, and every token chooses afresh;
- markov: as zipf, but each expert of the token before stays with a probability (--stay);
- domains: every 400 tokens other favourites, as when the subject changes; four subjects take turns.

Beside them come the demo model's own routing, recorded while it answers held-out questions (--demo), and traces that
were recorded elsewhere (--trace). The table is docs/RESIDENCY.md's.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np

import mlx_mimo
from mlx_mimo.experts.policy import DEFAULT_HALF_LIFE_TOKENS
from mlx_mimo.experts.simulate import needs_of, simulate
from mlx_mimo.experts.trace import Call, Trace, TraceWriter, read_trace

LAYERS, EXPERTS, TOP_K = 12, 256, 8
SHARES = (0.05, 0.10, 0.25, 0.50)


def favourites(rng: np.random.Generator, skew: float) -> np.ndarray:
    """(LAYERS, EXPERTS) log probabilities: Zipf's law, each layer with an order of its own."""
    law = -skew * np.log(np.arange(1, EXPERTS + 1))
    return np.stack([rng.permutation(law) for _ in range(LAYERS)])


def choose(rng: np.random.Generator, logits: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """TOP_K distinct experts: `kept`, and others drawn by `logits`."""
    noisy = logits + rng.gumbel(size=EXPERTS)
    noisy[kept] = np.inf
    return np.argpartition(-noisy, TOP_K - 1)[:TOP_K]


def made_up(kind: str, tokens: int, skew: float, stay: float, seed: int = 0) -> Trace:
    rng = np.random.default_rng(seed)
    subjects = [favourites(rng, skew) for _ in range(4 if kind == "domains" else 1)]
    last = [np.zeros(0, dtype=int)] * LAYERS
    calls = []
    for token in range(tokens):
        logits = subjects[token // 400 % len(subjects)]
        for layer in range(LAYERS):
            kept = last[layer]
            kept = kept[rng.random(kept.size) < (stay if kind == "markov" else 0.0)]
            last[layer] = choose(rng, logits[layer], kept)
            calls.append(Call(layer, last[layer][None].astype(np.int32)))
    return Trace(tuple(range(LAYERS)), EXPERTS, TOP_K, kind, calls)


def demo(questions: int) -> Trace:
    """The demo model's routing: prompts in one piece, answers token by token, one question after another."""
    lines = (Path(mlx_mimo.__file__).parent / "demo" / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    items = [json.loads(lines[i * len(lines) // questions]) for i in range(questions)]
    with tempfile.TemporaryDirectory() as folder:
        model, tokenizer = mlx_mimo.load(expert_memory="all", trace=Path(folder) / "trace")
        for item in items:
            prompt = tokenizer.apply_chat_template(
                item["messages"],
                tools=item["tools"],
                add_generation_prompt=True,
                enable_thinking=item["mode"] == "on",
            )
            for _ in mlx_mimo.stream_generate(model, tokenizer, prompt, max_tokens=200):
                pass
        model.residency.close()
        return read_trace(Path(folder) / "trace")


def save(trace: Trace, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = TraceWriter(path, trace.layers, trace.num_experts, trace.top_k, trace.model, trace.slot_bytes)
    for call in trace.calls:
        writer(call.layer, call.chosen)
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--half-life", default=f"{DEFAULT_HALF_LIFE_TOKENS:g}", help="comma-separated tokens")
    parser.add_argument("--tokens", type=int, default=2400, help="of each made-up trace")
    parser.add_argument("--skew", type=float, default=0.7, help="Zipf's exponent")
    parser.add_argument("--stay", type=float, default=0.1, help="how likely an expert stays in markov")
    parser.add_argument("--only", default="zipf,markov,domains", help="comma-separated made-up traces")
    parser.add_argument("--demo", type=int, default=0, metavar="N", help="held-out questions for the demo model")
    parser.add_argument("--trace", nargs="*", default=[], help="recorded traces")
    parser.add_argument("--save", type=Path, metavar="DIR", help="write each trace there, for replay")
    args = parser.parse_args()
    half_lives = [float(text) for text in args.half_life.split(",")]
    traces = {kind: made_up(kind, args.tokens, args.skew, args.stay) for kind in args.only.split(",") if kind}
    if args.demo:
        traces["demo"] = demo(args.demo)
    traces |= {name: read_trace(name) for name in args.trace}
    heads = [f"lfu {half_life:g}" for half_life in half_lives]
    print("| trace | resident | " + " | ".join(["lru", *heads, "belady"]) + " |")
    print("|---|---|" + "---|" * (len(heads) + 2))
    for name, trace in traces.items():
        print(f"{name}: {trace.routed:,} routed experts", file=sys.stderr)
        if args.save:
            save(trace, args.save / f"{Path(name).stem}.trace")
        needs, every = needs_of(trace), len(trace.layers) * trace.num_experts
        for share in SHARES:
            slots = max(1, round(share * every))
            results = [simulate(trace, "lru", slots, needs=needs)]
            results += [simulate(trace, "lfu", slots, half_life, needs) for half_life in half_lives]
            results += [simulate(trace, "belady", slots, needs=needs)]
            print(
                f"| {name} | {share:.0%} | " + " | ".join(f"{100 * r.hit_rate:.1f}" for r in results) + " |", flush=True
            )


if __name__ == "__main__":
    main()
