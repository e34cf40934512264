"""Unmodified mlx-lm in a process of its own: `bench --against mlx-lm` asks it for one timed run at a time.

Run as `python -m mlx_mimo.runtime.peer DIR`. One JSON object a line comes in ({"past", "prompt", "following"}, token
ids) and one goes out ({"prefill_s", "decode_s"}); the first line out is {"ready": true}. It imports nothing of ours.
"""

import json
import sys
import time


def main() -> None:
    from pathlib import Path

    import mlx.core as mx
    from mlx_lm.generate import generate_step
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_lm.utils import load_model

    # A directory of ours may name our class as its model_file: this is to be mlx-lm's own.
    model, _ = load_model(Path(sys.argv[1]), model_config={"model_file": None})
    if mx.default_device() == mx.cpu:
        model.set_dtype(mx.float32)  # MLX's CPU backend is several times slower in bfloat16
    answer({"ready": True})
    for line in sys.stdin:
        case = json.loads(line)
        cache = make_prompt_cache(model)
        past = case["past"]
        for start in range(0, len(past), 2048):
            model(mx.array([past[start : start + 2048]]), cache=cache)
            mx.eval([entry.state for entry in cache])
        following = iter([*case["following"], 0, 0])
        began, first = time.perf_counter(), 0.0
        steps = generate_step(
            mx.array(case["prompt"]),
            model,
            max_tokens=len(case["following"]),
            sampler=lambda logprobs, following=following: mx.array([next(following)]),
            prompt_cache=cache,
        )
        for _ in steps:
            first = first or time.perf_counter()
        answer({"prefill_s": first - began, "decode_s": time.perf_counter() - first})
        mx.clear_cache()


def answer(fields: dict) -> None:
    print(json.dumps(fields), flush=True)


if __name__ == "__main__":
    main()
