"""Writes golden/*.npz: logits of transformers for the models of model_cases.py, with both readings of the window.

    python tests/models/make_golden.py

Needs torch. A case whose routing is nearly tied somewhere is refused: rounding would then decide which expert runs.
"""

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models.model_cases import CASES, GOLDEN, Case, fingerprint
from models.torch_reference import reference_model

MARGIN = 5e-5  # between the last expert chosen and the first that was not


def golden_logits(case: Case, window: int) -> np.ndarray:
    model = reference_model(case.config, case.weights(), window)
    margins = []

    def watch(router, _, output):
        choice = output[0].sigmoid() + router.e_score_correction_bias
        best = choice.topk(router.top_k + 1, dim=-1).values
        margins.append((best[:, -2] - best[:, -1]).min().item())

    for layer in model.model.layers:
        if hasattr(layer.mlp, "gate"):
            layer.mlp.gate.register_forward_hook(watch)
    with torch.no_grad():
        logits = model(torch.from_numpy(case.tokens()), use_cache=False).logits.numpy()
    if min(margins) < MARGIN:
        raise SystemExit(f"{case.name}: experts within {min(margins):.1e} of each other; give the case another seed")
    return logits


def main() -> None:
    GOLDEN.mkdir(exist_ok=True)
    for case in CASES.values():
        logits = {f"logits_{window}": golden_logits(case, window) for window in case.windows}
        path = GOLDEN / f"{case.name}.npz"
        np.savez_compressed(path, weights=fingerprint(case.weights()), **logits)
        print(f"{path.name}: {path.stat().st_size:,} bytes, largest logit {max(map(np.max, logits.values())):.2f}")


if __name__ == "__main__":
    main()
