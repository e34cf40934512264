"""`model.loaded`: what `load` knows of a model on this machine."""

import json

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tokenizer_utils import TokenizerWrapper
from support.cached import tiny_model
from support.converted import converted_directory, stacked_directory

from mlx_mimo import Residency, load
from mlx_mimo.planning.budget import CHUNK
from mlx_mimo.runtime import load as loading
from mlx_mimo.runtime.loaded import Loaded, LoadedModel, loaded_of
from mlx_mimo.runtime.sampling import GREEDY, generation_defaults


def test_load_returns_its_own_types():
    model, tokenizer = load(converted_directory(), expert_memory="all")
    assert isinstance(model, LoadedModel)
    assert isinstance(tokenizer, TokenizerWrapper)
    assert isinstance(model.residency, Residency)
    assert model.residency is model.loaded.residency
    model.residency.close()


@pytest.mark.filterwarnings("ignore:expert memory")
@pytest.mark.parametrize(("memory", "on_cpu", "wanted"), [("all", False, False), (1, False, True), ("all", True, True)])
def test_a_model_is_synchronous_with_streamed_experts_or_on_a_cpu(monkeypatch, memory, on_cpu, wanted):
    model, _ = load(converted_directory(), expert_memory=memory)
    assert model.loaded.synchronous == loading.is_synchronous(model.residency)
    monkeypatch.setattr(loading, "on_cpu", lambda: on_cpu)
    assert loading.is_synchronous(model.residency) == wanted
    model.residency.close()


def test_a_stacked_directory_has_no_residency(tmp_path):
    model, _ = load(stacked_directory(tmp_path))
    assert model.residency is None
    assert not loading.is_synchronous(None) or loading.on_cpu()


def test_sampling_defaults_are_those_of_the_directory():
    model, _ = load(converted_directory(), expert_memory="all")
    fields = json.loads((converted_directory() / "generation_config.json").read_text())
    assert model.loaded.sampling == generation_defaults(converted_directory())
    assert model.loaded.sampling["top_p"] == fields.get("top_p", 0.0)
    model.residency.close()


def test_what_is_known_is_no_parameter_of_the_model():
    model, _ = load(converted_directory(), expert_memory="all")
    assert "loaded" not in dict(model)
    assert all(isinstance(value, mx.array) for _, value in tree_flatten(model.parameters()))
    model.residency.close()


def test_a_model_that_load_did_not_make_has_the_defaults():
    for model in (tiny_model(), object()):
        assert loaded_of(model) == Loaded(None, CHUNK, False, GREEDY)
