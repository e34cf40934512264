"""Writes golden.npz: transformers' logits on the demo checkpoint, read by code that shares nothing with ours.

    python tests/demo/make_golden.py

Needs torch. Run it again whenever the checkpoint changes.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "demo_model"))

from demo.demo_weights import GOLDEN, KEPT, checkpoint_hash, prompts
from support.converted import DEMO_CHECKPOINT

MARGIN = 2e-6  # least gap between the scores of the last chosen expert and the next: below it rounding may swap them


def reference_logits(kept: int = KEPT) -> dict[str, np.ndarray]:
    """Maps held-out items to (kept, vocabulary) logits at the prompt's last positions."""
    import evaluate
    import torch

    torch.set_num_threads(1)
    net = evaluate.reference_network(DEMO_CHECKPOINT)
    margins = []

    def watch(router, _, output):
        best = (output[0].sigmoid() + router.e_score_correction_bias).topk(router.top_k + 1, dim=-1).values
        margins.append((best[:, -2] - best[:, -1]).min().item())

    for router in net.routers():
        router.register_forward_hook(watch)
    out = {}
    with torch.no_grad():
        for name, ids in prompts().items():
            out[name] = net.main(torch.from_numpy(ids), use_cache=False).logits[0, -kept:].numpy()
    if min(margins) < MARGIN:
        raise SystemExit(f"experts within {min(margins):.1e} of each other; choose other items in demo_weights.py")
    return out


def main() -> None:
    logits = reference_logits()
    np.savez_compressed(GOLDEN, checkpoint=checkpoint_hash(), **logits)
    print(f"{GOLDEN.name}: {GOLDEN.stat().st_size:,} bytes, {len(logits)} prompts")


if __name__ == "__main__":
    main()
