"""Where the time of a CPU decode step goes: `python examples/measure/cpu_step.py [--model DIR | --synthetic 1.2GB]`.

The clock stands round the parts of the layers that run on the host; what is not in one of them is the rest. No other
program should run meanwhile.
"""

import argparse
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from statistics import median

import mlx.core as mx
import numpy as np
from tqdm import tqdm

from mlx_mimo import load
from mlx_mimo.bench.synthetic import synthetic_config, write_synthetic
from mlx_mimo.cpu import decode
from mlx_mimo.cpu.decode import HostDecoderLayer
from mlx_mimo.experts.layer import ResidentSwitchGLU, StreamedSwitchGLU
from mlx_mimo.units import parse_size

REST = "norms, rotary embedding, caches, sums"


class Clock:
    """Sums seconds by part; parts must not nest."""

    def __init__(self):
        self.spent: dict[str, float] = defaultdict(float)

    def round(self, function, label):
        def timed(*arguments, **named):
            begun = time.perf_counter()
            result = function(*arguments, **named)
            mx.eval(result)
            self.spent[label] += time.perf_counter() - begun
            return result

        return timed


def watch(model, clock: Clock) -> None:
    """Wraps every part of `model` so that the clock times it."""
    decode.attend = clock.round(decode.attend, "attention")
    for layer in model.layers:
        layer._qkv = clock.round(layer._qkv, "q, k, v")
        layer.self_attn.o_proj.compute = clock.round(layer.self_attn.o_proj.compute, "attention output")
        if layer._gate_up is not None:
            layer._gate_up = clock.round(layer._gate_up, "dense layer")
            layer.mlp.down_proj.compute = clock.round(layer.mlp.down_proj.compute, "dense layer")
        else:
            layer.mlp.gate.compute = clock.round(layer.mlp.gate.compute, "router")
    for kind in (ResidentSwitchGLU, StreamedSwitchGLU):
        kind.__call__ = clock.round(kind.__call__, "experts")
    head = type(model.lm_head)
    head.__call__ = clock.round(head.__call__, "head")  # the layers call compute


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="converted directory (default: the demo)")
    parser.add_argument("--synthetic", metavar="SIZE", help="random weights of this size instead")
    parser.add_argument("--narrow", type=int, choices=(1, 2, 4), default=1, help="as in bench")
    parser.add_argument("--expert-memory", default="all")
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        directory = options.model
        if options.synthetic:
            directory = Path(folder)
            write_synthetic(directory, synthetic_config(parse_size(options.synthetic), "4bit", options.narrow), "4bit")
        model, _ = load(directory, expert_memory=options.expert_memory, threads=options.threads)
        if not all(isinstance(layer, HostDecoderLayer) for layer in model.layers):
            raise SystemExit("no CPU kernels are in use: this measures the CPU fallback only")
        tokens = np.random.default_rng(0).integers(0, model.args.vocab_size, options.context + 1)
        cache = model.make_cache()
        mx.eval(model(mx.array(tokens[None, :-1]), cache))
        step = mx.array(tokens[None, -1:])
        for _ in range(3):
            mx.eval(model(step, cache))
        whole = []
        for _ in range(options.steps):
            begun = time.perf_counter()
            mx.eval(model(step, cache))
            whole.append(time.perf_counter() - begun)
        clock, rows = Clock(), []
        watch(model, clock)
        for _ in tqdm(range(options.steps), desc="steps", leave=False):
            clock.spent.clear()
            begun = time.perf_counter()
            mx.eval(model(step, cache))
            clock.spent[REST] = time.perf_counter() - begun - sum(clock.spent.values())
            rows.append(dict(clock.spent))
    print(f"one step {1e3 * median(whole):.2f} ms, median of {options.steps}, context {options.context}")
    for part in sorted(rows[0], key=lambda part: -median(row[part] for row in rows)):
        spent = median(row[part] for row in rows)
        print(f"{part:45} {1e3 * spent:8.2f} ms {spent / median(whole):6.1%}")


if __name__ == "__main__":
    main()
