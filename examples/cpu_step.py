"""Where the time of a CPU decode step goes: `python examples/cpu_step.py [--model DIR | --synthetic 1.2GB]`.

Each part is waited for before the next begins, which on a CPU changes little: nothing overlaps there anyway. No other
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
from mlx_mimo.cpu.modules import KernelLinear, KernelRouter, KernelSwitchGLU
from mlx_mimo.experts.layer import ResidentSwitchGLU, StreamedSwitchGLU
from mlx_mimo.models.mimo_v2_flash import Attention
from mlx_mimo.runtime.budget import parse_size
from mlx_mimo.runtime.synthetic import synthetic_config, write_synthetic

PARTS = {
    "q_proj": "q, k, v", "k_proj": "q, k, v", "v_proj": "q, k, v", "o_proj": "attention output", "lm_head": "head",
    "gate_proj": "dense layer", "up_proj": "dense layer", "down_proj": "dense layer",
}  # fmt: skip
REST = "norms, rotary embedding, caches, sums (MLX)"


class Clock:
    """Seconds by part; one part at a time."""

    def __init__(self):
        self.spent: dict[str, float] = defaultdict(float)

    def wrap(self, function, label_of):
        def timed(*arguments, **named):
            waited = [a for a in arguments if isinstance(a, mx.array)]
            mx.eval(waited)  # what came before is not this part's
            begun = time.perf_counter()
            result = function(*arguments, **named)
            mx.eval(result)
            self.spent[label_of(arguments[0])] += time.perf_counter() - begun
            return result

        return timed


def watch(model, clock: Clock) -> None:
    """Puts the clock round every part of `model`."""
    labels = {id(module): PARTS.get(path.rpartition(".")[2], path) for path, module in model.named_modules()}
    for kind, label in (
        (KernelLinear, lambda module: labels[id(module)]),
        (KernelRouter, lambda module: "router"),
        *((kind, lambda module: "experts") for kind in (KernelSwitchGLU, ResidentSwitchGLU, StreamedSwitchGLU)),
    ):
        kind.__call__ = clock.wrap(kind.__call__, label)
    for module in model.modules():
        if isinstance(module, Attention):
            module.attend = clock.wrap(module.attend, lambda _: "attention")


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
        if not any(isinstance(module, KernelLinear) for module in model.modules()):
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
