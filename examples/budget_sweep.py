"""Speed and hit rate against expert memory, as a table and a plot: `python examples/budget_sweep.py [DIR] [PLOT]`.

The same as `mlx_mimo bench --expert-memory 10%,25%,50%,100% --plot sweep.png`, as a script to change.
"""

import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from mlx_mimo import load
from mlx_mimo.runtime.source import find
from mlx_mimo.runtime.timing import Case, run_case

directory = find(sys.argv[1] if len(sys.argv) > 1 else None).path
plot = sys.argv[2] if len(sys.argv) > 2 else "sweep.png"
case = Case(prompt_tokens=32, depth=0, generation_tokens=32)

model, tokenizer = load(directory, expert_memory="all")
every = model.residency.counters
text = tokenizer.encode("The budget says how many experts stay in memory. " * 20, add_special_tokens=False)
model.residency.close()

rows = []
for share in (0.1, 0.25, 0.5, 0.75):
    model, _ = load(directory, expert_memory=max(1, round(share * every.slots)) * every.slot_bytes)
    run_case(model, case, text)  # the first run fills the pool
    sample = run_case(model, case, text)
    hits = sample.decode_hits / (sample.decode_hits + sample.decode_misses)
    rows.append((share, hits, 31 / sample.decode_s))
    print(f"{share:4.0%} resident: {hits:6.1%} hits, {rows[-1][2]:6.1f} tokens/s")
    model.residency.close()

figure, axes = plt.subplots()
axes.plot([100 * row[0] for row in rows], [row[2] for row in rows], marker="o")
axes.set(xlabel="experts resident, %", ylabel="decode, tokens/s", ylim=(0, None))
figure.savefig(plot, dpi=150)
