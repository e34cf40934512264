"""A wrong checkpoint is refused in one line, and nothing is left behind."""

import json

import numpy as np
import pytest
from support import checkpoints
from support.converted import fp8_directory
from support.damage import copy, edit, edit_json

from mlx_mimo.convert.__main__ import main


def refused(source, tmp_path, capsys, *flags: str, code: int = 1) -> str:
    """The one line that the command prints."""
    target = tmp_path / "mlx"
    assert main(["--hf-path", str(source), "--mlx-path", str(target), "--quiet", *flags]) == code
    text = capsys.readouterr().err
    assert text.startswith("error: ")
    assert text.count("\n") == 1
    assert not (target / "config.json").exists()
    assert not list(target.glob("*.part")) if target.exists() else True
    return text


@pytest.fixture
def source(tmp_path):
    return copy(fp8_directory(), tmp_path / "fp8")


def test_a_missing_shard_is_named(source, tmp_path, capsys):
    (source / "model_2_linear_fc1.safetensors").unlink()
    assert "model_2_linear_fc1.safetensors: no such file" in refused(source, tmp_path, capsys)
    assert not (tmp_path / "mlx").exists()


def test_a_truncated_shard_is_named(source, tmp_path, capsys):
    path = source / "model_3_linear_fc2.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "model_3_linear_fc2.safetensors" in refused(source, tmp_path, capsys)
    assert not (tmp_path / "mlx").exists()


def test_a_tensor_that_the_index_names_and_no_file_has_is_named(source, tmp_path, capsys):
    name = "model.layers.1.mlp.experts.0.up_proj.weight"
    edit_json(source / "model.safetensors.index.json", lambda i: i["weight_map"].update({name: "model_1.safetensors"}))
    text = refused(source, tmp_path, capsys)
    assert name in text
    assert "model_1.safetensors" in text


def test_a_tensor_that_the_index_lacks_is_named(source, tmp_path, capsys):
    name = "model.layers.2.self_attn.q_proj.weight"
    edit_json(source / "model.safetensors.index.json", lambda index: index["weight_map"].pop(name))
    assert name in refused(source, tmp_path, capsys)


def test_a_scale_that_the_index_lacks_is_named(source, tmp_path, capsys):
    name = "model.layers.2.self_attn.q_proj.weight_scale_inv"
    edit_json(source / "model.safetensors.index.json", lambda index: index["weight_map"].pop(name))
    assert name in refused(source, tmp_path, capsys)


def test_a_tensor_that_the_model_does_not_have_is_named(source, tmp_path, capsys):
    edit_json(
        source / "model.safetensors.index.json",
        lambda index: index["weight_map"].update({"model.layers.9.extra.weight": "model_1.safetensors"}),
    )
    assert "model.layers.9.extra.weight" in refused(source, tmp_path, capsys)


def test_an_index_that_points_out_of_the_directory_is_refused(source, tmp_path, capsys):
    edit_json(
        source / "model.safetensors.index.json",
        lambda index: index["weight_map"].update({"model.norm.weight": "../../secret.safetensors"}),
    )
    assert "model.norm.weight" in refused(source, tmp_path, capsys)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
def test_scales_that_are_not_positive_numbers_are_named(source, tmp_path, capsys, bad):
    name = "model.layers.3.mlp.experts.7.down_proj.weight"
    edit(source, name + "_scale_inv", lambda cells: np.full_like(cells, bad))
    assert f"{name}_scale_inv: 1 of 1 scales" in refused(source, tmp_path, capsys)
    assert not (tmp_path / "mlx").exists()


def test_nan_codes_are_named(source, tmp_path, capsys):
    name = "model.layers.3.mlp.experts.7.down_proj.weight"
    edit(source, name, lambda codes: np.full_like(codes, 0x7F))
    assert name in refused(source, tmp_path, capsys)


def test_a_shape_other_than_config_says_is_named(source, tmp_path, capsys):
    edit_json(source / "config.json", lambda config: config.update(moe_intermediate_size=128))
    assert "experts.0.gate_proj.weight: shape [64, 128] found, [128, 128] expected" in refused(source, tmp_path, capsys)


@pytest.mark.parametrize(
    ("field", "value"),
    [("head_dim", 0), ("num_experts_per_tok", 9), ("hybrid_layer_pattern", [0, 1]), ("model_type", "llama")],
)
def test_a_wrong_field_of_config_is_named(source, tmp_path, capsys, field, value):
    edit_json(source / "config.json", lambda config: config.update({field: value}))
    assert field in refused(source, tmp_path, capsys)
    assert not (tmp_path / "mlx").exists()


def test_a_config_that_is_not_json_is_named(source, tmp_path, capsys):
    (source / "config.json").write_text("{")
    assert "config.json" in refused(source, tmp_path, capsys)


def test_scales_that_fit_no_map_are_refused_unless_a_flag_names_the_map(source, tmp_path, capsys):
    for layer in (0, 3):
        for which in "kv":
            edit(source, f"model.layers.{layer}.self_attn.{which}_proj.weight", lambda codes: codes & 0xF7)
    text = refused(source, tmp_path, capsys)
    assert "no map fits" in text
    assert "--kv-scales" in text
    target = ["--mlx-path", str(tmp_path / "forced")]
    assert main(["--hf-path", str(source), *target, "--quiet", "--kv-scales", "chain"]) == 0
    fields = json.loads((tmp_path / "forced" / "mlx_mimo.json").read_text())
    assert fields["kv_scales"]["0"]["map"] == "chain"


def test_experts_that_do_not_divide_into_groups_are_refused(tmp_path, capsys):
    config = checkpoints.tiny_config(moe_intermediate_size=96)
    checkpoints.write_checkpoint(tmp_path / "fp8", config)
    text = refused(tmp_path / "fp8", tmp_path, capsys)
    assert "model.layers.1.mlp.experts.0.down_proj.weight: 96 columns" in text
    assert main(["--hf-path", str(tmp_path / "fp8"), "--mlx-path", str(tmp_path / "a"), "--q-group-size", "32"]) == 0


@pytest.mark.parametrize(
    "flags", [("--q-bits", "7"), ("--recipe", "4bits"), ("--recipe", "bf16", "--q-bits", "4"), ("--q-group-size", "48")]
)
def test_wrong_flags_are_refused(tmp_path, capsys, flags):
    refused(fp8_directory(), tmp_path, capsys, *flags, code=2)
    assert not (tmp_path / "mlx").exists()


def test_a_source_that_is_not_a_directory_is_refused(tmp_path, capsys):
    assert "nothing-here" in refused(tmp_path / "nothing-here", tmp_path, capsys, code=2)


def test_a_target_with_other_files_is_refused(tmp_path, capsys):
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / "thesis.txt").write_text("mine")
    assert "not empty" in refused(fp8_directory(), tmp_path, capsys, code=2)
    assert (tmp_path / "mlx" / "thesis.txt").read_text() == "mine"
