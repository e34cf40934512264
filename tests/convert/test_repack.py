"""Repacking makes mlx-lm's directories expert-major with the same values, also when interrupted in place."""

import json

import mlx.core as mx
import numpy as np
import pytest
from support.converted import converted_directory, fp8_directory
from support.damage import copy, load_all

from mlx_mimo.bridge import __main__ as bridge
from mlx_mimo.checkpoint.record import expert_files
from mlx_mimo.convert import writer
from mlx_mimo.convert.__main__ import main
from mlx_mimo.convert.repack import STATE, repack
from mlx_mimo.convert.verify import verify
from mlx_mimo.errors import MimoError, UsageError


class Stop(Exception):
    """Raised to interrupt a repacking."""


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """The checkpoint as unmodified mlx-lm converts it to 4 bits, in several files."""
    from mlx_lm import convert

    def small_shards(weights: dict) -> list[dict]:
        names = list(weights)
        return [{name: weights[name] for name in names[begin : begin + 30]} for begin in range(0, len(names), 30)]

    target = tmp_path_factory.mktemp("stock") / "mlx"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mlx_lm.utils.make_shards", small_shards)
        convert(str(fp8_directory()), str(target), quantize=True, q_bits=4, q_group_size=64)
    assert len(list(target.glob("*.safetensors"))) > 3
    return target


def same_values(repacked, stock) -> None:
    old, new = load_all(stock), load_all(repacked)
    for name, (dtype, array) in old.items():
        if ".switch_mlp." not in name:
            assert new.pop(name)[0] == dtype
            continue
        for expert in range(len(array)):
            found = new.pop(name.replace(".switch_mlp.", f".experts.{expert}."))
            assert found[0] == dtype
            np.testing.assert_array_equal(found[1], array[expert], err_msg=name)
    assert not new


def same_logits(a, b) -> None:
    from mlx_lm import load

    logits = [np.array(load(str(path))[0](mx.array([[5, 6, 7]])).astype(mx.float32)) for path in (a, b)]
    np.testing.assert_array_equal(*logits)


def test_the_bridge_is_kept_in_place_and_left_out_of_a_new_directory(stock, tmp_path):
    directory = copy(stock, tmp_path / "mlx")
    bridge.switch(directory, True)
    repack(directory, tmp_path / "new", progress=False)
    assert not bridge.is_on(tmp_path / "new")
    assert verify(tmp_path / "new") == []
    repack(directory, None, progress=False)
    assert bridge.is_on(directory)
    assert verify(directory) == []
    bridge.switch(directory, False)
    assert verify(directory) == []


def test_repacking_into_a_new_directory_keeps_every_value(stock, tmp_path):
    assert main(["repack", str(stock), "--mlx-path", str(tmp_path / "mlx"), "--quiet"]) == 0
    same_values(tmp_path / "mlx", stock)
    same_logits(tmp_path / "mlx", stock)
    assert [file.num_experts for file in expert_files(tmp_path / "mlx").values()] == [8, 8, 8]
    assert verify(tmp_path / "mlx") == []


def test_repacking_in_place_keeps_every_value(stock, tmp_path):
    target = copy(stock, tmp_path / "mlx")
    assert main(["repack", str(target), "--in-place", "--quiet"]) == 0
    same_values(target, stock)
    assert verify(target) == []
    assert not list(target.glob("model-0000*")), "old files are gone"
    before = {path.name: path.stat().st_mtime_ns for path in target.iterdir()}
    assert main(["repack", str(target), "--in-place", "--quiet"]) == 0  # nothing left to do
    assert {path.name: path.stat().st_mtime_ns for path in target.iterdir()} == before


@pytest.mark.parametrize("writes", [3, 40, 90, 130, 200])
def test_an_interrupted_repacking_in_place_goes_on(stock, tmp_path, monkeypatch, writes):
    target, count = copy(stock, tmp_path / "mlx"), 0
    write = writer.FileWriter.write

    def counted(self, data):
        nonlocal count
        count += 1
        if count == writes:
            raise Stop
        write(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(writer.FileWriter, "write", counted)
        with pytest.raises(Stop):
            repack(target, None, progress=False)
    assert not (target / "config.json").exists()
    assert (target / STATE).exists()
    repack(target, None, progress=False)
    same_values(target, stock)
    assert verify(target) == []


def test_repacking_in_place_deletes_old_files_early(stock, tmp_path, monkeypatch):
    target, free = copy(stock, tmp_path / "mlx"), []
    write = writer.FileWriter.write

    def counted(self, data):
        free.append(sum(path.stat().st_size for path in target.glob("*.safetensors*")))
        write(self, data)

    total = sum(path.stat().st_size for path in stock.glob("*.safetensors"))
    monkeypatch.setattr(writer.FileWriter, "write", counted)
    repack(target, None, progress=False)
    assert (
        max(free) < 1.8 * total
    )  # this model is one large trunk; of a real one a layer's experts are the largest part


def test_a_directory_that_mlx_lm_did_not_write_is_refused(tmp_path, capsys):
    with pytest.raises(UsageError, match="an FP8 checkpoint"):
        repack(fp8_directory(), tmp_path / "mlx")
    assert repack(converted_directory(), tmp_path / "mlx") == tmp_path / "mlx"  # expert-major already
    assert not (tmp_path / "mlx").exists()


def test_a_stack_of_another_number_of_experts_is_refused(stock, tmp_path):
    target = copy(stock, tmp_path / "mlx")
    config = json.loads((target / "config.json").read_text()) | {"n_routed_experts": 9}
    (target / "config.json").write_text(json.dumps(config))
    with pytest.raises(MimoError, match=r"shape \[8, 64, 16\] found, 9 experts expected"):
        repack(target, None)
    assert (target / "config.json").exists()
