"""Repair mends directories that mlx-lm made with the flat map, from the source's scales alone."""

import json

import pytest
from support import checkpoints, hub
from support.damage import copy

from mlx_mimo.convert import convert_checkpoint, remote
from mlx_mimo.convert import repair as module
from mlx_mimo.convert.__main__ import main
from mlx_mimo.convert.converted import ConvertedSource
from mlx_mimo.convert.repair import OLD, examine, relative_errors, repair
from mlx_mimo.convert.source import Source
from mlx_mimo.convert.verify import verify
from mlx_mimo.errors import MimoError


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("chain") / "fp8"
    checkpoints.write_checkpoint(path, checkpoints.tiny_config(hidden_size=256, num_key_value_heads=4), seed=13)
    return path


@pytest.fixture(scope="module")
def stock(source, tmp_path_factory):
    """The checkpoint as unmodified mlx-lm converts it to 4 bits: K and V of the global layers are misread."""
    from mlx_lm import convert

    target = tmp_path_factory.mktemp("stock") / "mlx"
    convert(str(source), str(target), quantize=True, q_bits=4, q_group_size=64)
    return target


@pytest.fixture(scope="module")
def fresh(source, tmp_path_factory):
    """The same recipe by our converter, read by the chain: the best that a repair can reach."""
    target = tmp_path_factory.mktemp("fresh") / "mlx"
    recipe = tmp_path_factory.mktemp("recipe") / "all4.toml"
    recipe.write_text('[[rule]]\npattern = "*"\nbits = 4\n')
    convert_checkpoint(source, target, recipe=str(recipe), progress=False)
    return target


def errors(directory, source) -> dict:
    return {layer: relative_errors(ConvertedSource(directory), Source(source), layer) for layer in (0, 3)}


def test_repaired_within_2_percent_of_a_fresh_conversion(source, stock, fresh, tmp_path):
    target, best = copy(stock, tmp_path / "mlx"), errors(fresh, source)
    found = repair(target, Source(source), measure=True)
    assert [finding.layer for finding in found] == [0, 3]
    for finding in found:
        assert finding.made_with == "flat"
        for which in "kv":
            assert finding.error_before[which] > 0.3
            assert finding.error_after[which] < 1.02 * best[finding.layer][which]
            assert finding.error_after[which] < 0.11
    assert not (target / OLD).exists()


def test_only_k_and_v_scales_and_biases_change(source, stock, tmp_path):
    from support.damage import load_all

    target = copy(stock, tmp_path / "mlx")
    repair(target, Source(source))
    old, new = load_all(stock), load_all(target)
    changed = {name for name in old if old[name][1].tobytes() != new[name][1].tobytes()}
    assert changed == {
        f"model.layers.{n}.self_attn.{p}_proj.{s}" for n in (0, 3) for p in "kv" for s in ("scales", "biases")
    }


def test_a_second_repair_finds_nothing_to_do(source, stock, tmp_path, capsys):
    target = copy(stock, tmp_path / "mlx")
    assert main(["repair", str(target), "--source", str(source), "--check"]) == 1
    assert "layer 0: read as flat" in capsys.readouterr().out
    assert main(["repair", str(target), "--source", str(source)]) == 0
    assert "mended" in capsys.readouterr().out
    bytes_once = {path.name: path.read_bytes() for path in target.iterdir()}
    assert main(["repair", str(target), "--source", str(source)]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in target.iterdir()} == bytes_once
    assert main(["repair", str(target), "--source", str(source), "--check"]) == 0


@pytest.mark.parametrize("recipe", ["4bit", "bf16", "3bit"])
def test_layers_read_by_the_chain_are_left_alone(source, tmp_path, recipe):
    convert_checkpoint(source, tmp_path / "mlx", recipe=recipe, progress=False)
    assert {finding.made_with for finding in repair(tmp_path / "mlx", Source(source))} == {"chain"}
    assert verify(tmp_path / "mlx") == []


@pytest.mark.parametrize("recipe", ["4bit", "bf16"])
def test_a_directory_that_convert_made_with_the_flat_map_is_mended(source, tmp_path, recipe):
    target = tmp_path / "mlx"
    convert_checkpoint(source, target, recipe=recipe, kv_scales="flat", progress=False)
    found = repair(target, Source(source), measure=True)
    assert all(max(finding.error_after.values()) < 0.01 for finding in found)
    assert verify(target) == []
    assert json.loads((target / "mlx_mimo.json").read_text())["kv_scales"]["0"]["map"] == "chain"


def test_an_interrupted_repair_is_undone_and_done_again(source, stock, tmp_path, monkeypatch):
    target = copy(stock, tmp_path / "mlx")
    write = module._write

    def half(directory, todo):
        write(directory, todo[: len(todo) // 2])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "_write", half)
        with pytest.raises(KeyboardInterrupt):
            repair(target, Source(source))
    assert (target / OLD).exists()
    repair(target, Source(source))
    twin = copy(stock, tmp_path / "twin")
    repair(twin, Source(source))
    assert {p.name: p.read_bytes() for p in target.iterdir()} == {p.name: p.read_bytes() for p in twin.iterdir()}


def test_over_http_only_the_scales_are_fetched(source, stock, tmp_path, monkeypatch):
    target = copy(stock, tmp_path / "mlx")
    monkeypatch.setattr(remote, "FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with hub.serving(mimo=source) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        assert main(["repair", str(target), "--source", "test/mimo"]) == 0
        ranges = {file for file, wanted in server.requests if wanted}
        assert ranges == {"model_0.safetensors", "model_3.safetensors"}
        headers = sum(8 + int.from_bytes((source / file).read_bytes()[:8], "little") for file in ranges)
        scales = 2 * (8 + 4) * 2 * 4  # two layers; 8 scale rows of K and 4 of V; 2 columns of float32
        sent = sum(server.sent[file] for file in ranges)
        assert sent - headers <= 3 * scales  # examined, mended, examined again
    assert {finding.made_with for finding in examine(ConvertedSource(target), Source(source))} == {"chain"}


def test_the_scales_of_another_source_are_refused(stock, tmp_path):
    other = tmp_path / "other"
    checkpoints.write_checkpoint(other, checkpoints.tiny_config(hidden_size=256, num_key_value_heads=4), seed=6)
    before = {path.name: path.read_bytes() for path in stock.iterdir()}
    with pytest.raises(MimoError, match=r"model.layers.0.self_attn: neither"):
        repair(stock, Source(other))
    assert {path.name: path.read_bytes() for path in stock.iterdir()} == before


def test_mxfp4_cannot_be_mended(source, tmp_path):
    recipe = tmp_path / "all.toml"
    recipe.write_text('[[rule]]\npattern = "*"\nmode = "mxfp4"\n')
    convert_checkpoint(source, tmp_path / "mlx", recipe=str(recipe), kv_scales="flat", progress=False)
    with pytest.raises(MimoError, match="powers of two"):
        repair(tmp_path / "mlx", Source(source))
