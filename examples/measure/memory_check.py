"""Compares the peak memory of a model many times larger than its expert memory with the budget's figure.

    python examples/measure/memory_check.py [--size 2GB] [--narrow 4] [--expert-memory 60MB] [--prompt-tokens 512]

Generates a checkpoint of random weights, answers a prompt in a process of its own and compares that process's peak with
slots + trunk + KV caches + transients, as `mlx_mimo.planning.budget` counts them, + the peak of a process that loads
nothing. Exits with 1 if the peak is higher.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_mimo.bench.synthetic import synthetic_config, write_synthetic
from mlx_mimo.checkpoint.record import expert_files
from mlx_mimo.config.model_args import ModelArgs
from mlx_mimo.experts.banks import Banks
from mlx_mimo.planning.budget import CHUNK, Budget, item_bytes, measure
from mlx_mimo.planning.memory import peak_memory_bytes
from mlx_mimo.runtime.compute import choose_compute
from mlx_mimo.runtime.load import load, load_tokenizer, on_cpu
from mlx_mimo.runtime.source import find
from mlx_mimo.runtime.stream import stream_generate
from mlx_mimo.units import format_size, parse_size


def child(directory: Path, expert_memory: str, prompt_tokens: int, generated: int) -> None:
    """Prints the peak of this process and the bytes of its slots; with no expert memory it loads nothing."""
    slots = 0
    if expert_memory == "0":
        found = find(directory)
        load_tokenizer(found)
        run_kernels(directory, found.config["hidden_size"])
    else:
        model, tokenizer = load(directory, expert_memory=expert_memory)
        prompt = [2 + i % 1000 for i in range(prompt_tokens)]
        for _ in stream_generate(model, tokenizer, prompt, max_tokens=generated):
            pass
        counters = model.residency.counters
        slots = counters.slots * counters.slot_bytes
    print(json.dumps({"peak": peak_memory_bytes(), "slots": slots}))


def run_kernels(directory: Path, hidden: int) -> None:
    """Runs one expert of zeros for one token and for several: compiled kernels do not count as the model's memory."""
    layout = next(iter(expert_files(directory).values())).layout
    compute = choose_compute(layout, hidden)
    bank = Banks(layout, 1, compute.widen).arrays
    for rows, grouped in ((1, False), (64, True)):
        mx.eval(compute(mx.zeros((rows, hidden)), np.zeros((rows, 1), np.int32), bank, grouped))


def run(directory: Path, expert_memory: str, args: argparse.Namespace) -> dict:
    command = [sys.executable, __file__, "--child", directory, "--expert-memory", expert_memory]
    command += ["--prompt-tokens", args.prompt_tokens, "--generation-tokens", args.generation_tokens]
    result = subprocess.run([str(part) for part in command], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(result.stdout.splitlines()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="2GB", help="of the checkpoint")
    parser.add_argument("--narrow", type=int, default=4, choices=(1, 2, 4), help="divides the release's widths")
    parser.add_argument("--expert-memory", default="60MB")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--generation-tokens", type=int, default=32)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child, args.expert_memory, args.prompt_tokens, args.generation_tokens)
        return 0
    config = synthetic_config(parse_size(args.size), "4bit", args.narrow)
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "model"
        write_synthetic(directory, config, "4bit")
        context = args.prompt_tokens + args.generation_tokens
        chunk = min(args.prompt_tokens, CHUNK)
        budget: Budget = measure(directory, ModelArgs.from_dict(config), context, chunk, *item_bytes(on_cpu()))
        nothing = run(directory, "0", args)["peak"]
        something = run(directory, args.expert_memory, args)
    parts = {
        "slots": something["slots"],
        "trunk": budget.trunk,
        "KV": budget.kv,
        "transients": budget.transients,
        "a process with nothing loaded": nothing,
    }
    allowed = sum(parts.values())
    print(f"{format_size(budget.experts)} of experts, {context} tokens: peak {format_size(something['peak'])}")
    print(
        "at most " + " + ".join(f"{format_size(n)} {name}" for name, n in parts.items()) + f" = {format_size(allowed)}"
    )
    return int(something["peak"] > allowed)


if __name__ == "__main__":
    raise SystemExit(main())
