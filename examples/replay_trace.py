"""Record which experts a model chose, then ask what other budgets and policies would have hit.

`python examples/replay_trace.py [DIR] [TRACE]`
"""

import sys

from mlx_mimo import load, stream_generate
from mlx_mimo.errors import MimoError
from mlx_mimo.experts.simulate import REPLAY_POLICIES, needs_of, simulate
from mlx_mimo.experts.trace import read_trace

path = sys.argv[2] if len(sys.argv) > 2 else "routing.trace"
try:
    model, tokenizer = load(sys.argv[1] if len(sys.argv) > 1 else None, trace=path)
except MimoError as error:  # such as stacked experts, which cannot be traced; the message says what to do
    raise SystemExit(str(error)) from None
for _ in stream_generate(model, tokenizer, "A trace holds the choices of every router.", max_tokens=64):
    pass
model.residency.close()  # ends the trace

trace = read_trace(path)
needs, every = needs_of(trace), len(trace.layers) * trace.num_experts
print(f"{len(trace.calls)} calls, {trace.routed} routed experts, {every} experts in all")
print("resident  " + "  ".join(f"{name:>7}" for name in REPLAY_POLICIES))
for share in (0.05, 0.1, 0.25, 0.5):
    slots = max(1, round(share * every))
    rates = [simulate(trace, name, slots, needs=needs).hit_rate for name in REPLAY_POLICIES]
    print(f"{share:8.0%}  " + "  ".join(f"{rate:7.1%}" for rate in rates))
