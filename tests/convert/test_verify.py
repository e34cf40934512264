"""verify names damage and measures the loss; inspect and --dry-run show what is stored."""

import json

import numpy as np
import pytest
from support.converted import converted_directory, fp8_directory
from support.damage import copy, edit, edit_json

from mlx_mimo.bridge import __main__ as bridge
from mlx_mimo.convert import convert_checkpoint
from mlx_mimo.convert.__main__ import main
from mlx_mimo.convert.inspect import describe
from mlx_mimo.convert.source import Source
from mlx_mimo.convert.verify import compare, verify


@pytest.fixture
def directory(tmp_path):
    return copy(converted_directory(), tmp_path / "mlx")


@pytest.mark.parametrize("recipe", ["4bit", "mixed-2-3", "mxfp4", "bf16", "3bit"])
def test_a_fresh_conversion_has_no_problems(recipe):
    assert verify(converted_directory(recipe)) == []


def test_one_changed_bit_is_found(directory, capsys):
    path = directory / "model-experts-2.safetensors"
    data = bytearray(path.read_bytes())
    data[-5000] ^= 1
    path.write_bytes(data)
    assert main(["verify", str(directory)]) == 1
    assert "model-experts-2.safetensors: its bytes are not those" in capsys.readouterr().out


def test_the_bridge_is_not_a_problem_and_hides_none(directory):
    bridge.switch(directory, True)
    assert verify(directory) == []
    config = directory / "config.json"
    whole = (converted_directory() / "config.json").stat().st_size
    config.write_bytes(config.read_bytes().replace(b"}", b" }", 1))
    assert verify(directory) == [f"config.json: {whole:,} bytes expected, {whole + 1:,} found; convert again"]


def test_missing_and_short_files_are_named(directory):
    (directory / "model-mtp.safetensors").unlink()
    assert "model-mtp.safetensors: no such file" in verify(directory)[0]
    path = directory / "model-trunk-00001.safetensors"
    (directory / "model-mtp.safetensors").write_bytes((converted_directory() / "model-mtp.safetensors").read_bytes())
    path.write_bytes(path.read_bytes()[:-1])
    assert "model-trunk-00001.safetensors" in verify(directory)[0]


def test_a_missing_tokenizer_is_named(directory):
    (directory / "tokenizer.json").unlink()
    assert verify(directory) == ["tokenizer.json: missing"]


def test_shapes_other_than_config_says_are_named(directory):
    edit_json(directory / "config.json", lambda config: config["quantization"].update(bits=8))
    problems = verify(directory)
    assert any("gate_proj.weight: U32 [64, 16] found, U32 [64, 32] expected" in problem for problem in problems)


def test_scales_that_are_not_finite_are_named(directory):
    name = "model.layers.1.self_attn.q_proj.scales"
    edit(directory, name, lambda bits: np.full_like(bits, 0x7FC0))
    (directory / "mlx_mimo.json").unlink()
    problems = verify(directory)
    assert problems[0].startswith("mlx_mimo.json: missing")
    assert problems[1:] == [f"model-trunk-00001.safetensors: {name}: 1536 values are not finite"]


def test_an_extra_file_that_mlx_lm_would_load_is_named(directory):
    (directory / "model-old.safetensors").write_bytes(b"x")
    assert verify(directory) == ["model-old.safetensors: not in the manifest, yet mlx-lm would load it"]


def test_an_unfinished_conversion_is_named(directory):
    (directory / "mlx_mimo-journal.jsonl").write_text("{}\n")
    assert "unfinished" in verify(directory)[0]


@pytest.mark.parametrize("recipe", ["4bit", "mixed-2-3", "mxfp4", "bf16"])
def test_deep_comparison_gives_the_errors_of_the_manifest(recipe):
    directory = converted_directory(recipe)
    rows = compare(directory, Source(fp8_directory()))
    wanted = json.loads((directory / "mlx_mimo.json").read_text())["relative_error"]
    by_kind = {}
    for row in rows:
        by_kind.setdefault(row["kind"], []).append(row["relative_error"])
    for kind, error in wanted.items():
        assert min(by_kind[kind]) * 0.999 <= error <= max(by_kind[kind]) * 1.001, kind
    assert {row["layer"] for row in rows} == {-1, 0, 1, 2, 3}


def test_deep_comparison_shows_a_misread_chain(tmp_path):
    convert_checkpoint(fp8_directory(), tmp_path / "flat", kv_scales="flat", progress=False)
    fields = json.loads((tmp_path / "flat" / "mlx_mimo.json").read_text())
    fields["kv_scales"] = {}
    (tmp_path / "flat" / "mlx_mimo.json").write_text(json.dumps(fields))
    errors = {(r["layer"], r["kind"]): r["relative_error"] for r in compare(tmp_path / "flat", Source(fp8_directory()))}
    assert errors[0, "global.v_proj"] > 0.2
    assert errors[1, "sliding.v_proj"] < 0.01


def test_the_command_line_compares_deeply(capsys):
    arguments = ["verify", str(converted_directory()), "--deep", "--source", str(fp8_directory())]
    assert main(arguments) == 0
    assert "experts.down_proj" in capsys.readouterr().out
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["problems"] == []


def test_inspect_shows_recipe_maps_and_bits(capsys):
    found = describe(converted_directory("mixed-2-3"))
    kinds = {row["kind"]: row for row in found["kinds"]}
    assert found["recipe"] == "mixed-2-3"
    assert found["kv_scale_maps"] == {"chain": 2}
    assert kinds["experts.down_proj"]["bits_per_weight"] == 3.5
    assert kinds["experts.up_proj"]["bits_per_weight"] == 2.5
    assert main(["inspect", str(converted_directory())]) == 0
    assert "4-bit group 64" in capsys.readouterr().out


def test_dry_run_shows_the_bytes_that_are_written_and_reads_no_weights(tmp_path, capsys):
    for name in ("config.json", "model.safetensors.index.json"):
        (tmp_path / name).write_bytes((fp8_directory() / name).read_bytes())
    assert main(["--hf-path", str(tmp_path), "--dry-run"]) == 0
    said = capsys.readouterr().out.splitlines()[-1].split()
    stored = converted_directory()
    total = json.loads((stored / "model.safetensors.index.json").read_text())["metadata"]["total_size"]
    assert int(said[3].replace(",", "")) == total
    assert not (tmp_path / "mlx_model").exists()
