"""How the next token is chosen: flags over the model's generation_config.json over greedy."""

import json
from argparse import Namespace

import mlx.core as mx
import mlx_lm.sample_utils
import pytest

from mlx_mimo.generate import build_parser
from mlx_mimo.runtime.sampling import GREEDY, generation_defaults, sampler_for

RELEASED = {"do_sample": True, "temperature": 0.8, "top_p": 0.95, "top_k": 20}
LOGPROBS = mx.log(mx.array([[0.5, 0.3, 0.15, 0.05]]))


def defaults_of(tmp_path, config) -> dict:
    text = config if isinstance(config, str) else json.dumps(config)
    (tmp_path / "generation_config.json").write_text(text, encoding="utf-8")
    return generation_defaults(tmp_path)


@pytest.fixture
def asked(monkeypatch) -> list[dict]:
    """What mlx-lm's make_sampler is called with."""
    calls = []
    monkeypatch.setattr(mlx_lm.sample_utils, "make_sampler", lambda **values: calls.append(values))
    return calls


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        (RELEASED, {"temp": 0.8, "top_p": 0.95, "top_k": 20}),
        ({"do_sample": True}, {"temp": 1.0, "top_p": 0.0, "top_k": 0}),
        ({"temperature": 0.6}, {"temp": 0.6, "top_p": 0.0, "top_k": 0}),  # a temperature means sampling
        ({"temperature": 0.6, "top_k": None}, {"temp": 0.6, "top_p": 0.0, "top_k": 0}),
        (RELEASED | {"do_sample": False}, GREEDY),
        ({"top_p": 0.9}, GREEDY),
        ({}, GREEDY),
    ],
)
def test_defaults_are_what_generation_config_says(tmp_path, config, wanted):
    assert defaults_of(tmp_path, config) == wanted


def test_without_generation_config_the_default_is_greedy(tmp_path):
    assert generation_defaults(tmp_path) == GREEDY == {"temp": 0.0, "top_p": 0.0, "top_k": 0}


def test_a_generation_config_that_is_not_json_leaves_greedy(tmp_path):
    assert defaults_of(tmp_path, "{temperature") == GREEDY


def test_the_models_defaults_reach_the_sampler_where_no_flag_is_given(tmp_path, asked):
    sampler_for(build_parser().parse_args([]), defaults_of(tmp_path, RELEASED))
    assert asked == [{"temp": 0.8, "top_p": 0.95, "top_k": 20, "min_p": 0.0}]


@pytest.mark.parametrize(
    ("flags", "changed"),
    [
        (["--temp", "0.3"], {"temp": 0.3}),
        (["--temp", "0"], {"temp": 0.0}),
        (["--top-p", "0.5"], {"top_p": 0.5}),
        (["--top-k", "7"], {"top_k": 7}),
        (["--min-p", "0.1"], {"min_p": 0.1}),
        (["--temp", "0.3", "--top-k", "7"], {"temp": 0.3, "top_k": 7}),
    ],
)
def test_a_flag_replaces_its_own_default_and_no_other(tmp_path, asked, flags, changed):
    sampler_for(build_parser().parse_args(flags), defaults_of(tmp_path, RELEASED))
    assert asked == [{"temp": 0.8, "top_p": 0.95, "top_k": 20, "min_p": 0.0} | changed]


def test_a_command_without_a_flag_takes_the_default_for_it(asked):
    sampler_for(Namespace(temp=0.5), GREEDY)
    assert asked == [{"temp": 0.5, "top_p": 0.0, "top_k": 0, "min_p": 0.0}]


def test_greedy_takes_the_most_likely_token():
    sampler = sampler_for(Namespace(), GREEDY)
    assert {sampler(LOGPROBS).item() for _ in range(20)} == {0}


def drawn(times: int = 300, **flags) -> set[int]:
    mx.random.seed(0)
    sampler = sampler_for(Namespace(**flags), GREEDY)
    return {sampler(LOGPROBS).item() for _ in range(times)}


def test_limits_leave_out_the_unlikely_tokens():
    assert drawn(temp=1.0) == {0, 1, 2, 3}
    assert drawn(temp=1.0, top_k=2) == {0, 1}
    assert drawn(temp=1.0, top_p=0.7) == {0, 1}
    assert drawn(temp=1.0, min_p=0.25) == {0, 1, 2}  # of the likeliest token's probability


def test_a_seed_repeats_what_is_drawn():
    sampler = sampler_for(Namespace(temp=1.0), GREEDY)

    def draw() -> list[int]:
        mx.random.seed(3)
        return [sampler(LOGPROBS).item() for _ in range(30)]

    assert draw() == draw()
