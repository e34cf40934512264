"""Start with the experts that were used most last time: `python examples/warm_profile.py [DIR] [PROFILE]`.

Helps where the next work is like the last; on other work the pool adapts as without a profile.
"""

import sys
import time

from mlx_mimo import load, stream_generate

directory = sys.argv[1] if len(sys.argv) > 1 else None
profile = sys.argv[2] if len(sys.argv) > 2 else "usage.profile"
PROMPT = "A profile is a list of how often each expert was used."

model, _ = load(directory, expert_memory="all")
if model.residency is None:
    raise SystemExit(f"{directory}: its experts are stacked; run mlx_mimo convert repack {directory} --in-place first")
every = model.residency.counters
model.residency.close()
memory = every.slots // 4 * every.slot_bytes

for what in ("cold", "warm"):
    began = time.perf_counter()
    model, tokenizer = load(directory, expert_memory=memory, profile=None if what == "cold" else profile)
    loaded = time.perf_counter() - began
    *_, response = stream_generate(model, tokenizer, PROMPT, max_tokens=16)
    counters = model.residency.counters
    print(
        f"{what}: loaded in {loaded:.2f} s ({counters.preloaded} experts read for the profile), first token after "
        f"{response.ttft_s:.2f} s, {counters.hit_rate:.1%} hits"
    )
    model.residency.save_profile(profile)
    model.residency.close()
