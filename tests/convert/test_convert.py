"""Converting a checkpoint: what is written, and that unmodified mlx-lm reads it."""

import json

import mlx.core as mx
import numpy as np
import pytest
from support import checkpoints
from support.converted import converted_directory, fp8_directory
from support.damage import copy, edit, load_all

from mlx_mimo.checkpoint.record import ALIGNMENT, expert_files
from mlx_mimo.convert import convert_checkpoint
from mlx_mimo.convert.__main__ import main
from mlx_mimo.convert.quantize import bfloat16


def stored_value(tensors: dict, name: str, quantization: dict) -> np.ndarray:
    """A weight as float32, dequantised as mlx-lm does."""
    base = name.removesuffix(".weight")
    dtype, array = tensors[name]
    if dtype != "U32":
        return checkpoints.bfloat16_values(array) if dtype == "BF16" else array
    parts = base.split(".")
    path = base
    if "experts" in parts:
        path = ".".join([*parts[:4], "switch_mlp", parts[6]])
    form = quantization.get(path, {key: quantization[key] for key in ("group_size", "bits", "mode")})
    sides = [tensors[f"{base}.{part}"] for part in ("scales", "biases") if f"{base}.{part}" in tensors]
    sides = [mx.array(checkpoints.bfloat16_values(a) if d == "BF16" else a) for d, a in sides]
    return np.array(mx.dequantize(mx.array(array), *sides, **form).astype(mx.float32))


def relative(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize(("recipe", "expert_error"), [("4bit", 0.11), ("8bit", 0.01), ("mxfp4", 0.14), ("bf16", 0.003)])
def test_every_weight_is_stored_within_its_quantization_error(recipe, expert_error):
    directory = converted_directory(recipe)
    weights = checkpoints.random_weights(checkpoints.tiny_config())
    tensors = load_all(directory)
    quantization = json.loads((directory / "config.json").read_text()).get("quantization", {})
    for name, wanted in weights.items():
        error = relative(stored_value(tensors, name, quantization), wanted)
        limit = expert_error if ".experts." in name else 0.003 if recipe == "bf16" else 0.01
        assert error < limit, name
    assert {name for name in tensors if name.endswith((".weight", "bias"))} == set(weights)


def test_bf16_recipe_is_the_rounded_product_exactly():
    weights = checkpoints.random_weights(checkpoints.tiny_config())
    tensors = load_all(converted_directory("bf16"))
    for name, (dtype, array) in tensors.items():
        np.testing.assert_array_equal(array, bfloat16(weights[name]) if dtype == "BF16" else weights[name], name)


def test_router_is_float32_norms_and_sinks_are_as_released():
    source, tensors = load_all(fp8_directory()), load_all(converted_directory())
    kept = [name for name in source if "norm" in name or ".mlp.gate." in name or "sink" in name]
    assert len(kept) > 20
    for name in kept:
        assert tensors[name][0] == source[name][0]
        np.testing.assert_array_equal(tensors[name][1], source[name][1])
    assert tensors["model.layers.1.mlp.gate.weight"][0] == "F32"


def test_expert_files_are_expert_major_and_begin_on_a_page():
    files = expert_files(converted_directory())
    assert list(files) == [1, 2, 3]
    for file in files.values():
        assert file.num_experts == 8
        assert file.data_offset == ALIGNMENT


def test_multi_token_prediction_has_at_least_8_bits():
    tensors = load_all(converted_directory("2bit"))
    assert tensors["model.mtp.layers.2.mlp.up_proj.weight"][1].shape == (256, 128 // 4)


def test_unmodified_mlx_lm_loads_and_generates():
    from mlx_lm import generate, load

    mx.random.seed(0)
    model, tokenizer = load(str(converted_directory()))
    assert model.layers[1].mlp.switch_mlp.gate_proj.bits == 4
    assert model.layers[1].self_attn.q_proj.bits == 8
    assert model.layers[1].mlp.gate.weight.dtype == mx.float32
    assert generate(model, tokenizer, prompt="hello", max_tokens=4) is not None


@pytest.mark.parametrize("recipe", ["mixed-2-3", "mxfp4", "bf16", "5bit"])
def test_unmodified_mlx_lm_computes_with_every_recipe(recipe):
    from mlx_lm import load

    model, _ = load(str(converted_directory(recipe)))
    if recipe == "bf16":
        model.set_dtype(mx.float32)  # MLX on the CPU multiplies gathered matrices in float32 only
    assert np.isfinite(np.array(model(mx.array([[1, 2, 3]])).astype(mx.float32))).all()


@pytest.mark.parametrize("hidden", [192, 320])
def test_hidden_sizes_that_are_not_a_multiple_of_the_block_convert(tmp_path, hidden):
    config = checkpoints.tiny_config(hidden_size=hidden, moe_intermediate_size=192, num_hidden_layers=2,
                                     hybrid_layer_pattern=[0, 1], moe_layer_freq=[0, 1])  # fmt: skip
    weights = checkpoints.write_checkpoint(tmp_path / "fp8", config, seed=3)
    convert_checkpoint(tmp_path / "fp8", tmp_path / "mlx", recipe="bf16", kv_scales="chain", progress=False)
    for name, (dtype, array) in load_all(tmp_path / "mlx").items():
        np.testing.assert_array_equal(array, bfloat16(weights[name]) if dtype == "BF16" else weights[name], name)


def test_scales_are_found_in_another_file_than_their_weight(tmp_path):
    checkpoints.write_checkpoint(tmp_path / "fp8", checkpoints.tiny_config(), scattered_scales=True)
    convert_checkpoint(tmp_path / "fp8", tmp_path / "mlx", progress=False)
    assert (tmp_path / "mlx" / "model-trunk-00001.safetensors").read_bytes() == (
        converted_directory() / "model-trunk-00001.safetensors"
    ).read_bytes()


def test_files_that_the_index_does_not_name_are_not_read(tmp_path):
    source = copy(fp8_directory(), tmp_path / "fp8")
    (source / "model_99.safetensors").write_bytes(b"not a checkpoint")
    convert_checkpoint(source, tmp_path / "mlx", progress=False)


def test_the_manifest_has_size_and_sha256_of_every_file():
    directory = converted_directory()
    fields = json.loads((directory / "mlx_mimo.json").read_text())
    import hashlib

    for name, file in fields["files"].items():
        data = (directory / name).read_bytes()
        assert file == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert set(fields["files"]) | {"mlx_mimo.json"} == {path.name for path in directory.iterdir()}
    assert fields["kv_scales"]["0"]["map"] == "chain"
    assert fields["kv_scales"]["3"]["cells_without_448"]["chain"] == 0
    assert 0.08 < fields["relative_error"]["experts.up_proj"] < 0.11


def test_the_same_input_gives_the_same_bytes(tmp_path):
    convert_checkpoint(fp8_directory(), tmp_path / "mlx", progress=False, threads=3)
    for path in converted_directory().iterdir():
        assert (tmp_path / "mlx" / path.name).read_bytes() == path.read_bytes(), path.name


def test_pieces_do_not_change_the_result(tmp_path, monkeypatch):
    monkeypatch.setattr("mlx_mimo.convert.writer.PIECE_ELEMENTS", 128 * 50)
    convert_checkpoint(fp8_directory(), tmp_path / "mlx", progress=False)
    for path in converted_directory().glob("*.safetensors"):
        assert (tmp_path / "mlx" / path.name).read_bytes() == path.read_bytes(), path.name


def test_flat_scales_are_recognised(tmp_path):
    config = checkpoints.tiny_config(hidden_size=512, num_key_value_heads=4)
    weights = checkpoints.write_checkpoint(tmp_path / "fp8", config, kv_scales="flat")
    convert_checkpoint(tmp_path / "fp8", tmp_path / "mlx", recipe="bf16", progress=False)
    fields = json.loads((tmp_path / "mlx" / "mlx_mimo.json").read_text())
    assert fields["kv_scales"]["0"]["map"] == "flat"
    name = "model.layers.0.self_attn.k_proj.weight"
    np.testing.assert_array_equal(load_all(tmp_path / "mlx")[name][1], bfloat16(weights[name]))


def test_a_wrong_map_that_is_asked_for_gives_wrong_weights(tmp_path):
    convert_checkpoint(fp8_directory(), tmp_path / "mlx", recipe="bf16", kv_scales="flat", progress=False)
    weights = checkpoints.random_weights(checkpoints.tiny_config())
    name = "model.layers.0.self_attn.v_proj.weight"
    found = checkpoints.bfloat16_values(load_all(tmp_path / "mlx")[name][1])
    assert relative(found, weights[name]) > 0.2


def test_misread_tensors_are_warned_of(tmp_path, capsys):
    source = copy(fp8_directory(), tmp_path / "fp8")
    for layer in (1, 2):
        edit(source, f"model.layers.{layer}.self_attn.q_proj.weight", lambda codes: codes & 0xF7)  # no code is 0x7E now
    convert_checkpoint(source, tmp_path / "mlx", progress=False)
    assert "sliding.q_proj: 12 of 12 scales have no ±448 code" in capsys.readouterr().err


def test_the_command_line_converts(tmp_path, capsys):
    arguments = ["--hf-path", str(fp8_directory()), "--mlx-path", str(tmp_path / "mlx"), "--q-bits", "3", "--quiet"]
    assert main(arguments) == 0
    config = json.loads((tmp_path / "mlx" / "config.json").read_text())
    assert config["quantization"]["bits"] == 3
    assert config["quantization"]["lm_head"] == {"group_size": 64, "bits": 8, "mode": "affine"}
    assert config["sliding_window_size"] == 16
    assert main([*arguments[:-1]]) == 0
    assert "already converted" in capsys.readouterr().err
