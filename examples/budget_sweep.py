"""Speed and hit rate against expert memory, as a table and a plot: `python examples/budget_sweep.py [DIR] [PLOT]`.

The same as `mlx_mimo bench --expert-memory 15%,25%,50%,75% --text FILE --plot sweep.png`, as a script to change.
"""

import json
import sys
from statistics import median

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from mlx_mimo import load
from mlx_mimo.bench.timing import Case, run_case
from mlx_mimo.demo import CHECKPOINT
from mlx_mimo.runtime.source import find

RUNS = 3  # the first fills the pool and does not count

directory = find(sys.argv[1] if len(sys.argv) > 1 else None).path
plot = sys.argv[2] if len(sys.argv) > 2 else "sweep.png"
case = Case(prompt_tokens=32, depth=0, generation_tokens=16)

model, tokenizer = load(directory, expert_memory="all")
if model.residency is None:
    raise SystemExit(f"{directory}: its experts are stacked; run mlx_mimo convert repack {directory} --in-place first")
every = model.residency.counters
model.residency.close()

# A piece of its own for every run: a text that comes again would find its experts in memory.
questions = (CHECKPOINT.parent / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
text = " ".join(json.loads(line)["messages"][-1]["content"] for line in questions[:: len(questions) // 100])
tokens = tokenizer.encode(text, add_special_tokens=False)
pieces = [tokens[run * case.tokens : (run + 1) * case.tokens] for run in range(RUNS)]

rows = []
for share in (0.15, 0.25, 0.5, 0.75):
    model, _ = load(directory, expert_memory=max(1, round(share * every.slots)) * every.slot_bytes)
    samples = [run_case(model, case, piece) for piece in pieces][1:]
    model.residency.close()
    hits, misses = (sum(getattr(sample, f"decode_{what}") for sample in samples) for what in ("hits", "misses"))
    speed = median((case.generation_tokens - 1) / sample.decode_s for sample in samples)
    rows.append((share, speed))
    print(f"{share:4.0%} resident: {hits / (hits + misses):6.1%} hits, {speed:6.1f} tokens/s")

figure, axes = plt.subplots()
axes.plot([100 * share for share, _ in rows], [speed for _, speed in rows], marker="o")
axes.set(xlabel="experts resident, %", ylabel="decode, tokens/s", ylim=(0, None))
figure.savefig(plot, dpi=150)
