"""A profile is read back for the model it was made with, and rejected for any other."""

import json

import numpy as np
import pytest
from support.tiny_experts import EXPERTS, random_experts, write_expert_file

from mlx_mimo.checkpoint.record import expert_files
from mlx_mimo.errors import MimoError
from mlx_mimo.experts.profile import Profile, fingerprint, load_profile, save_profile


@pytest.fixture
def files(tmp_path):
    for layer in (1, 2):
        write_expert_file(tmp_path, layer, random_experts(seed=layer))
    return expert_files(tmp_path)


@pytest.fixture
def saved(tmp_path, files):
    uses = {layer: np.arange(EXPERTS) * layer for layer in files}
    save_profile(tmp_path / "p.json", Profile(fingerprint(files), 12.5, uses))
    return tmp_path / "p.json"


def test_a_profile_is_read_as_it_was_written(saved, files):
    profile = load_profile(saved, fingerprint(files), files)
    assert profile.tokens == 12.5
    for layer in files:
        np.testing.assert_array_equal(profile.uses[layer], np.arange(EXPERTS) * layer)
    assert [path.name for path in saved.parent.glob("p.json*")] == ["p.json"]


def test_models_have_different_fingerprints(tmp_path, files):
    first = fingerprint(files)
    assert fingerprint(expert_files(tmp_path)) == first
    write_expert_file(tmp_path, 2, random_experts(seed=9))
    assert fingerprint(expert_files(tmp_path)) != first
    write_expert_file(tmp_path, 2, random_experts("affine3", seed=2))
    assert fingerprint(expert_files(tmp_path)) != first


def test_a_profile_of_another_model_is_rejected(saved, files):
    with pytest.raises(MimoError, match=r"^p.json: profile of another model"):
        load_profile(saved, "0" * 32, files)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "not a profile"),
        ({"version": 2}, "profile version 2, 1 expected"),
        ({"tokens": "many"}, "damaged profile"),
        ({"tokens": -1}, "damaged profile"),
        ({"uses": []}, "damaged profile"),
        ({"uses": {"1": [0] * EXPERTS}}, "damaged profile"),
        ({"uses": {"1": [0] * EXPERTS, "2": [0]}}, "damaged profile: layer 2"),
        ({"uses": {"1": [0] * EXPERTS, "2": [None] * EXPERTS}}, "damaged profile: layer 2"),
        ({"uses": {"1": [0] * EXPERTS, "2": [-1] * EXPERTS}}, "damaged profile: layer 2"),
        ({"uses": {"1": [0] * EXPERTS, "2": [1e400] * EXPERTS}}, "damaged profile: layer 2"),
    ],
)
def test_a_damaged_profile_is_rejected(saved, files, change, message):
    saved.write_text(json.dumps(json.loads(saved.read_text()) | change))
    with pytest.raises(MimoError, match=f"^p.json: {message}"):
        load_profile(saved, fingerprint(files), files)


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff", '"x"', "[" * 100000])
def test_a_file_that_is_not_a_profile_is_rejected(saved, files, text):
    saved.write_text(text, encoding="latin-1")
    with pytest.raises(MimoError, match=r"^p.json: not a profile"):
        load_profile(saved, fingerprint(files), files)


def test_errors_name_a_profile_that_cannot_be_read_or_written(tmp_path, files):
    with pytest.raises(MimoError, match="profile cannot be read"):
        load_profile(tmp_path / "nowhere", "", files)
    with pytest.raises(MimoError, match="profile cannot be written"):
        save_profile(tmp_path / "no" / "p", Profile("", 0, {}))
