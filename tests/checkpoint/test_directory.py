"""Directory: what a model directory holds, of which kind it is, and each problem of its files by the file's name."""

import json
import os
import shutil
from collections import Counter

import pytest
from support.converted import converted_directory, fp8_directory, stacked_directory
from support.damage import copy, edit_json

from mlx_mimo.checkpoint import directory as directory_module
from mlx_mimo.checkpoint import record as record_module
from mlx_mimo.checkpoint.directory import Directory
from mlx_mimo.checkpoint.header import read_header
from mlx_mimo.checkpoint.index import INDEX, checked_weight_map
from mlx_mimo.checkpoint.manifest import MANIFEST
from mlx_mimo.errors import FormatError
from mlx_mimo.runtime.load import load

TRUNK, EXPERTS = "model-trunk-00001.safetensors", "model-experts-2.safetensors"


@pytest.fixture
def path(tmp_path):
    """A copy of a converted directory, to damage."""
    return copy(converted_directory(), tmp_path / "model")


@pytest.fixture
def reads(monkeypatch):
    """{file: how often its header has been read}"""
    found = Counter()

    def counted(path):
        found[path.name] += 1
        return read_header(path)

    for module in (directory_module, record_module):
        monkeypatch.setattr(module, "read_header", counted)
    return found


def only_problem(path) -> str:
    """The one problem of a directory, which `check` raises."""
    problems = list(Directory(path).problems())
    assert len(problems) == 1, problems
    with pytest.raises(FormatError) as raised:
        Directory(path).check()
    assert str(raised.value) == problems[0]
    return problems[0]


# What it holds


def test_a_converted_directory_has_no_problems():
    directory = Directory(converted_directory())
    assert list(directory.problems()) == []
    assert list(directory.manifest_problems(deep=True)) == []
    assert directory.files == [file.name for file in directory.weight_files]
    assert directory.weight_map["model.layers.2.mlp.experts.0.up_proj.weight"] == EXPERTS
    assert [(layer, file.num_experts) for layer, file in directory.expert_files.items()] == [(1, 8), (2, 8), (3, 8)]
    assert directory.manifest.recipe_name == "4bit"
    assert (directory.is_streamable, directory.is_fp8) == (True, False)


def test_an_fp8_checkpoint_is_fp8_and_has_no_manifest():
    directory = Directory(fp8_directory())
    assert (directory.is_fp8, directory.is_streamable, directory.manifest) == (True, False, None)
    assert list(directory.problems()) == []
    assert list(directory.manifest_problems(deep=True)) == []


def test_a_directory_of_stacked_experts_is_not_streamable(tmp_path):
    stacked_directory(tmp_path)
    directory = Directory(tmp_path)
    assert (directory.is_streamable, directory.is_fp8) == (False, False)
    assert list(directory.problems()) == []


def test_a_directory_without_an_index_is_known_by_its_files(path):
    indexed = Directory(path).weight_map
    (path / INDEX).unlink()
    directory = Directory(path)
    assert directory.weight_map == indexed
    assert not directory.has_index
    assert list(directory.problems()) == []


def test_a_known_config_and_weight_map_are_not_read_again(tmp_path):
    directory = Directory(tmp_path, {"model_type": "known"}, {"a": "model.safetensors"})
    assert directory.config == {"model_type": "known"}
    assert directory.files == ["model.safetensors"]


def test_each_header_is_read_once_whatever_is_asked(reads):
    directory = Directory(converted_directory())
    for _ in range(2):
        directory.check()
        assert directory.is_streamable
        assert directory.weight_map
        assert directory.header(TRUNK).tensors
    assert reads == dict.fromkeys(directory.files, 1)


def test_load_reads_each_header_once(reads):
    model, _ = load(converted_directory(), expert_memory="100kB")
    model.residency.close()
    assert reads == {path.name: 1 for path in Directory(converted_directory()).weight_files}


def test_a_forgotten_header_is_read_again(reads):
    directory = Directory(converted_directory())
    directory.check()
    directory.forget_headers()
    assert directory.header(EXPERTS).tensors
    assert reads[EXPERTS] == 2


# What is wrong with it


def test_a_directory_without_weights(tmp_path):
    assert only_problem(tmp_path).endswith("no model*.safetensors; a converted directory expected")


def test_a_missing_file(path):
    (path / EXPERTS).unlink()
    assert only_problem(path).startswith(f"{EXPERTS}: no such file")


def test_a_short_file(path):
    size = (path / TRUNK).stat().st_size
    os.truncate(path / TRUNK, size - 100)
    assert only_problem(path).startswith(f"{TRUNK}: {size:,} bytes expected from its header, {size - 100:,} found")


def test_a_tensor_that_the_index_names_and_its_file_lacks(path):
    edit_json(path / INDEX, lambda index: index["weight_map"].update({"model.nothing.weight": TRUNK}))
    assert only_problem(path).startswith(f"{TRUNK}: model.nothing.weight is missing, {INDEX} expects it here")


def test_every_file_with_a_problem_is_named(path):
    (path / EXPERTS).unlink()
    os.truncate(path / TRUNK, 4)
    assert [problem.partition(":")[0] for problem in Directory(path).problems()] == [EXPERTS, TRUNK]


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "\udcff"])
def test_an_index_that_is_not_one(path, text):
    (path / INDEX).write_bytes(text.encode(errors="surrogateescape"))
    assert only_problem(path).startswith(f"{INDEX}: not an index of safetensors files")


@pytest.mark.parametrize(
    "file", [5, None, ["a"], {}, "", "../model.safetensors", "/model.safetensors", "a/model.safetensors", "model.bin"]
)
def test_an_index_names_plain_safetensors_files_only(file):
    with pytest.raises(FormatError, match=rf"^{INDEX}: not an index .*lm_head\.weight lies in"):
        checked_weight_map({"weight_map": {"model.norm.weight": "model.safetensors", "lm_head.weight": file}})


def test_an_expert_file_in_another_format(path):
    shutil.copy(path / TRUNK, path / "model-experts-9.safetensors")
    with pytest.raises(FormatError, match=r"^model-experts-9\.safetensors: .* is not a tensor of an expert of layer 9"):
        _ = Directory(path).expert_files


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 1}', '{"format": 1, "files": {"a": {"bytes": 1}}}'])
def test_a_manifest_that_is_not_one(path, text):
    (path / MANIFEST).write_text(text)
    problems = list(Directory(path).manifest_problems(deep=False))
    assert len(problems) == 1
    assert problems[0].startswith(f"{MANIFEST}: not a manifest")


def test_a_manifest_of_another_format(path):
    edit_json(path / MANIFEST, lambda manifest: manifest.update(format=2))
    assert list(Directory(path).manifest_problems(deep=False)) == [f"{MANIFEST}: format 2 found, 1 expected"]


def test_files_that_are_not_as_the_manifest_says(path):
    (path / "tokenizer.json").unlink()
    (path / "generation_config.json").write_text("{}")
    wanted = json.loads((path / MANIFEST).read_text())["files"]["generation_config.json"]["bytes"]
    assert list(Directory(path).manifest_problems(deep=False)) == [
        f"generation_config.json: {wanted:,} bytes expected, 2 found; convert again",
        "tokenizer.json: missing",
    ]


def test_a_changed_byte_is_found_by_reading_every_byte(path):
    data = bytearray((path / EXPERTS).read_bytes())
    data[-1] ^= 1
    (path / EXPERTS).write_bytes(data)
    assert list(Directory(path).manifest_problems(deep=False)) == []
    assert list(Directory(path).manifest_problems(deep=True)) == [
        f"{EXPERTS}: its bytes are not those that were written (sha256); convert again"
    ]
