"""The embedded checkpoint is stored as the release stores its own: names, files, dtypes, scales, the K/V chain."""

import json
import re
import struct
from pathlib import Path

import numpy as np
import pytest

DEMO = Path(__file__).parents[2] / "mlx_mimo" / "demo"
CHECKPOINT = DEMO / "checkpoint"
CONFIG = json.loads((CHECKPOINT / "config.json").read_text())
INDEX = json.loads((CHECKPOINT / "model.safetensors.index.json").read_text())
LAYERS = CONFIG["num_hidden_layers"]
PATTERN = CONFIG["hybrid_layer_pattern"]
HIDDEN, HEAD, VALUE = CONFIG["hidden_size"], 192, 128
NUMPY = {"F8_E4M3": np.uint8, "BF16": np.uint16, "F32": np.float32}


@pytest.fixture(scope="module")
def tensors():
    """Maps names to (dtype, array of raw codes), read with NumPy alone."""
    out = {}
    for file in sorted(set(INDEX["weight_map"].values())):
        data = (CHECKPOINT / file).read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        for name, entry in json.loads(data[8 : 8 + length]).items():
            if name != "__metadata__":
                first, last = entry["data_offsets"]
                raw = np.frombuffer(data[8 + length + first : 8 + length + last], NUMPY[entry["dtype"]])
                out[name] = entry["dtype"], raw.reshape(entry["shape"])
                assert INDEX["weight_map"][name] == file
    assert out.keys() == INDEX["weight_map"].keys()
    return out


def cells(length: int) -> int:
    return -(-length // 128)


def expected_attention(prefix: str, sliding: bool) -> dict:
    heads = CONFIG["num_attention_heads"]
    kv = CONFIG["swa_num_key_value_heads"] if sliding else CONFIG["num_key_value_heads"]
    out = {prefix + "o_proj.weight": ("BF16", (HIDDEN, heads * VALUE))}
    for part, rows in (("q", heads * HEAD), ("k", kv * HEAD), ("v", kv * VALUE)):
        scale_rows = cells(rows) if sliding or part == "q" else kv * (2 if part == "k" else 1)
        out[f"{prefix}{part}_proj.weight"] = ("F8_E4M3", (rows, HIDDEN))
        out[f"{prefix}{part}_proj.weight_scale_inv"] = ("F32", (scale_rows, cells(HIDDEN)))
    if sliding:
        out[prefix + "attention_sink_bias"] = ("BF16", (heads,))
    return out


def expected_mlp(prefix: str, width: int) -> dict:
    out = {}
    for part, shape in (("gate", (width, HIDDEN)), ("up", (width, HIDDEN)), ("down", (HIDDEN, width))):
        out[f"{prefix}{part}_proj.weight"] = ("F8_E4M3", shape)
        out[f"{prefix}{part}_proj.weight_scale_inv"] = ("F32", tuple(map(cells, shape)))
    return out


def expected() -> dict:
    """Returns every tensor's dtype and shape, from config.json and the release's table."""
    vocabulary, experts = CONFIG["vocab_size"], CONFIG["n_routed_experts"]
    out = {
        "model.embed_tokens.weight": ("BF16", (vocabulary, HIDDEN)),
        "lm_head.weight": ("BF16", (vocabulary, HIDDEN)),
        "model.norm.weight": ("BF16", (HIDDEN,)),
    }
    for i in range(LAYERS):
        prefix = f"model.layers.{i}."
        out |= expected_attention(prefix + "self_attn.", bool(PATTERN[i]))
        out |= {prefix + n + ".weight": ("BF16", (HIDDEN,)) for n in ("input_layernorm", "post_attention_layernorm")}
        if not CONFIG["moe_layer_freq"][i]:
            out |= expected_mlp(prefix + "mlp.", CONFIG["intermediate_size"])
            continue
        out[prefix + "mlp.gate.weight"] = ("F32", (experts, HIDDEN))
        out[prefix + "mlp.gate.e_score_correction_bias"] = ("F32", (experts,))
        for e in range(experts):
            out |= expected_mlp(f"{prefix}mlp.experts.{e}.", CONFIG["moe_intermediate_size"])
    norms = ("enorm", "hnorm", "input_layernorm", "pre_mlp_layernorm", "final_layernorm")
    for k in range(3):
        prefix = f"model.mtp.layers.{k}."
        out |= expected_attention(prefix + "self_attn.", sliding=True)
        out |= expected_mlp(prefix + "mlp.", CONFIG["intermediate_size"])
        out |= {f"{prefix}{n}.weight": ("BF16", (HIDDEN,)) for n in norms}
        out[prefix + "eh_proj.weight"] = ("BF16", (HIDDEN, 2 * HIDDEN))
    return out


def test_names_dtypes_and_shapes_are_those_of_the_release(tensors):
    assert {name: (dtype, array.shape) for name, (dtype, array) in tensors.items()} == expected()


def test_files_are_named_and_filled_as_in_the_release():
    for name, file in INDEX["weight_map"].items():
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        if ".mtp." in name:
            want = "model_mtp"
        elif layer and ".experts." in name:
            want = f"model_{layer[1]}_linear_fc{2 if 'down_proj' in name else 1}"
        elif layer:
            want = f"model_{layer[1]}"
        else:
            want = "model_embedding" if "embed" in name else "model_final"
        assert file == f"{want}.safetensors", name


def owners(codes: np.ndarray, rows: np.ndarray, count: int) -> np.ndarray:
    """Returns (count, column blocks) bool: whether a scale cell owns a code of ±448; `rows` maps rows to scale rows."""
    full = (codes & 0x7F) == 0x7E
    padded = np.zeros((len(codes), cells(codes.shape[1]) * 128), bool)
    padded[:, : codes.shape[1]] = full
    by_row = padded.reshape(len(codes), -1, 128).any(-1)
    return np.array([by_row[rows == r].any(0) for r in range(count)])


def test_every_scale_cell_outside_the_chain_owns_a_full_code(tensors):
    chained = {f"model.layers.{i}.self_attn.{p}_proj.weight" for i in range(LAYERS) if not PATTERN[i] for p in "kv"}
    for name, (dtype, codes) in tensors.items():
        if dtype == "F8_E4M3" and name not in chained:
            assert not ((codes & 0x7F) == 0x7F).any(), f"{name} holds NaN"
            rows = np.arange(len(codes)) // 128
            assert owners(codes, rows, cells(len(codes))).all(), name


@pytest.mark.parametrize("layer", [i for i in range(LAYERS) if not PATTERN[i]])
def test_global_k_and_v_share_a_chain_of_scales(tensors, layer):
    prefix, heads = f"model.layers.{layer}.self_attn.", CONFIG["num_key_value_heads"]
    k, v = (tensors[f"{prefix}{p}_proj.weight"][1] for p in "kv")
    both = np.concatenate([k, v])
    krow, vrow = np.arange(len(k)), np.arange(len(v))
    chain = np.concatenate([krow // HEAD * 3 + krow % HEAD // 128, vrow // VALUE * 3 + (HEAD + vrow % VALUE) // 128])
    assert owners(both, chain, heads * 3).all(), "each cell owns a full code under the chain map"
    k_scales = tensors[f"{prefix}k_proj.weight_scale_inv"][1]
    assert not owners(k, krow // 128, len(k_scales)).all(), "under the flat map some cell owns none"


def test_the_checkpoint_stays_under_20_megabytes():
    assert sum(f.stat().st_size for f in DEMO.rglob("*") if f.is_file() and f.suffix != ".pyc") < 20_000_000


def test_generation_is_greedy_and_stops_at_either_end_token():
    generation = json.loads((CHECKPOINT / "generation_config.json").read_text())
    added = {t["content"]: t["id"] for t in json.loads((CHECKPOINT / "tokenizer.json").read_text())["added_tokens"]}
    assert generation["do_sample"] is False
    assert generation["eos_token_id"] == [added["<|endoftext|>"], added["<|im_end|>"]]
