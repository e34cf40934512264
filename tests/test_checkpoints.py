"""The tiny checkpoints themselves: what every other test leans on."""

import hashlib

import mlx.core as mx
import numpy as np
import pytest
from models.model_cases import CASES, fingerprint
from support import checkpoints

from mlx_mimo.checkpoint.header import read_header


def test_codes_mean_what_mlx_says():
    ours, theirs = checkpoints.E4M3, np.array(mx.from_fp8(mx.arange(256).astype(mx.uint8), dtype=mx.float32))
    finite = ~np.isnan(ours)
    assert finite.sum() == 254
    assert np.array_equal(ours[finite], theirs[finite])


def test_encoding_is_to_nearest_with_ties_to_even():
    codes = checkpoints.encode_e4m3
    finite = checkpoints.E4M3[~np.isnan(checkpoints.E4M3)]
    assert np.array_equal(checkpoints.E4M3[codes(finite)], finite)
    values = np.ldexp(np.random.default_rng(0).integers(-448, 449, 2000), -np.arange(2000) % 20).astype(np.float32)
    nearest = np.abs(values[:, None] - finite[None]).min(axis=1)
    assert np.abs(values - checkpoints.E4M3[codes(values)]) == pytest.approx(nearest, abs=1e-9)
    assert codes(np.array([17.0, 19.0, 500.0, -1e-9])).tolist() == [0x58, 0x5A, 0x7E, 0x80]  # 16, 20, 448, -0


def test_every_scale_cell_owns_a_largest_code_under_the_chain_only():
    config = checkpoints.tiny_config()
    stored, weights = checkpoints.make_tensors(config, mtp=False)
    prefix = "model.layers.0.self_attn"
    largest = {name: np.isin(stored[f"{prefix}.{name}.weight"][1] & 0x7F, [0x7E]) for name in ("k_proj", "v_proj")}
    shapes = [stored[f"{prefix}.{name}.weight_scale_inv"][1].shape for name in ("k_proj", "v_proj")]
    assert shapes == [(4, 1), (2, 1)]
    k_rows, v_rows = checkpoints.chain_rows(2)
    for cell in range(4):
        assert largest["k_proj"][k_rows == cell].any() or largest["v_proj"][v_rows == ~cell].any()
    for cell in range(2):
        assert largest["v_proj"][v_rows == cell].any()
    name = f"{prefix}.v_proj.weight"
    flat = checkpoints.dequantise(stored[name][1], stored[f"{name}_scale_inv"][1])
    assert np.linalg.norm(flat - weights[name]) / np.linalg.norm(weights[name]) > 0.3


@pytest.mark.parametrize("scattered", [False, True])
def test_the_files_are_whole_and_the_index_names_them(tmp_path, scattered):
    weights = checkpoints.write_checkpoint(tmp_path, checkpoints.tiny_config(), scattered_scales=scattered)
    found = {}
    for path in tmp_path.glob("*.safetensors"):
        found |= {name: (path.name, entry.dtype) for name, entry in read_header(path).tensors.items()}
    assert {name for name in found if not name.endswith("_scale_inv")} == weights.keys()
    assert found["model.layers.1.mlp.gate.weight"] == ("model_1.safetensors", "F32")
    assert found["model.layers.1.self_attn.k_proj.weight"] == ("model_1.safetensors", "F8_E4M3")
    assert found["model.layers.2.mlp.experts.7.up_proj.weight"][0] == "model_2_linear_fc1.safetensors"
    apart = found["model.layers.1.self_attn.k_proj.weight_scale_inv"][0]
    assert apart == ("model_final.safetensors" if scattered else "model_1.safetensors")


def golden_input(name: str) -> str:
    case = CASES[name]
    return hashlib.sha256(fingerprint(case.weights()).encode() + case.tokens().astype("<i8").tobytes()).hexdigest()


def stored_bytes(kv_scales: str) -> str:
    stored, _ = checkpoints.make_tensors(checkpoints.tiny_config(), kv_scales=kv_scales)
    return fingerprint({name: array for name, (_, array) in stored.items()})


def test_every_processor_makes_the_same_bits():
    """Where these differ, a value came from more than IEEE 754 defines (or NumPy draws other integers), and golden
    files made here tell nothing elsewhere."""
    found = {name: golden_input(name)[:16] for name in CASES} | {kv: stored_bytes(kv)[:16] for kv in ("chain", "flat")}
    assert found == {
        "short_window": "010ef619951c4c73",
        "released_window": "5825ba6a2407dc9d",
        "sliding_first": "ec687572fa593840",
        "chain": "83d53c03495143bf",
        "flat": "0800ec4d6cd0ff34",
    }
