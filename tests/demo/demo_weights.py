"""The demo checkpoint's weights in float32 as our converter reads them, and prompts to compare logits on."""

import hashlib
import json
from pathlib import Path

import numpy as np
from support.converted import DEMO_CHECKPOINT

from mlx_mimo.convert import fp8
from mlx_mimo.convert.compute import Computer, find_kv_maps
from mlx_mimo.convert.source import open_source

HELD_OUT = DEMO_CHECKPOINT.parent / "heldout.jsonl"
GOLDEN = Path(__file__).with_name("golden.npz")
CONFIG = json.loads((DEMO_CHECKPOINT / "config.json").read_text())
CHOSEN = ("arithmetic-off-0", "arithmetic-on-6", "sorting-on-0", "facts_zh-off-3", "tools-off-0", "tools-on-1")
KEPT = 16  # last positions of each prompt whose logits are stored


def checkpoint_hash() -> str:
    """Returns a hash that the golden file stores, to tell whether it was made from this checkpoint."""
    digest = hashlib.sha256()
    for path in [*sorted(DEMO_CHECKPOINT.glob("*.safetensors")), DEMO_CHECKPOINT / "tokenizer.json"]:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def our_weights() -> dict[str, np.ndarray]:
    """Returns every tensor but the MTP layers' in float32: FP8 codes times the scales of the K/V map that we find."""
    source = open_source(DEMO_CHECKPOINT)
    computer = Computer(source, CONFIG, find_kv_maps(source, CONFIG))
    out = {}
    for name in source.weight_map:
        if name.endswith("_scale_inv") or ".mtp." in name:
            continue
        raw, dtype = source.read(name), source.entry(name).dtype
        if dtype == "F8_E4M3":
            out[name] = fp8.dequantize(raw, computer.scales(name))
        elif dtype == "BF16":
            out[name] = (raw.astype(np.uint32) << 16).view(np.float32)
        else:
            out[name] = raw
    source.close()
    return out


def prompts() -> dict[str, np.ndarray]:
    """Maps items of the held-out file to the (1, L) ids of their prompts; "all of them" is their concatenation."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(DEMO_CHECKPOINT)
    out = {}
    for line in HELD_OUT.read_text().splitlines():
        item = json.loads(line)
        if item["id"] in CHOSEN:
            text = tokenizer.apply_chat_template(
                item["messages"],
                tools=item["tools"],
                add_generation_prompt=True,
                enable_thinking=item["mode"] == "on",
                tokenize=False,
            )
            out[item["id"]] = np.array([tokenizer.encode(text, add_special_tokens=False)])
    assert set(out) == set(CHOSEN)
    out["all of them"] = np.concatenate(list(out.values()), axis=1)
    return out
