"""config.json: the fields that are accepted, and a one-line error for each that is not."""

import dataclasses
import subprocess
import sys

import pytest
from support import checkpoints

from mlx_mimo.config.model_args import ModelArgs
from mlx_mimo.errors import FormatError


def released_config() -> dict:
    return checkpoints.tiny_config(
        vocab_size=152576,
        hidden_size=4096,
        intermediate_size=16384,
        moe_intermediate_size=2048,
        num_hidden_layers=48,
        num_attention_heads=64,
        num_key_value_heads=4,
        swa_num_attention_heads=64,
        swa_num_key_value_heads=8,
        hybrid_layer_pattern=[0 if i == 0 or i % 6 == 5 else 1 for i in range(48)],
        moe_layer_freq=[0] + [1] * 47,
        sliding_window=128,
        sliding_window_size=128,
        n_routed_experts=256,
        num_experts_per_tok=8,
        max_position_embeddings=262144,
    )


def test_the_released_geometry():
    args = ModelArgs.from_dict(released_config())
    assert [i for i in range(48) if not args.is_sliding(i)] == [0, 5, 11, 17, 23, 29, 35, 41, 47]
    assert args.moe_layers == tuple(range(1, 48))
    for layer, kv_heads, theta, sinks in ((0, 4, 5e6, False), (1, 8, 1e4, True), (47, 4, 5e6, False)):
        assert (args.kv_heads(layer), args.theta(layer), args.has_sinks(layer)) == (kv_heads, theta, sinks)
        assert (args.heads(layer), args.head_dims(layer), args.rotary_dims(layer)) == (64, (192, 128), 64)
    assert (args.window, args.value_scale, args.router_scale) == (129, 0.707, 1.0)


def test_a_null_value_scale_is_one():
    assert ModelArgs.from_dict(checkpoints.tiny_config(attention_value_scale=None)).value_scale == 1.0


def test_the_window_can_be_set():
    assert ModelArgs.from_dict(released_config() | {"window_keys": 128}).window == 128


@pytest.mark.parametrize(
    "more",
    [
        {"quantization": {"group_size": 64, "bits": 4}, "mlx_mimo": {"format": 1}, "eos_token_id": [1, 2]},
        {"architectures": None},
        {"sliding_window": 17},  # as transformers saves it
        {"rope_scaling": {"type": "default"}},
        {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 5e6}}},
        {"n_shared_experts": 0},
        {"rope_theta": 5e6},
    ],
    ids=lambda more: ",".join(more),
)
def test_fields_that_do_not_change_the_computation_are_accepted(more):
    ModelArgs.from_dict(checkpoints.tiny_config() | more)


REFUSED = [
    ("model_type", "mimo_v2"),
    ("model_type", None),
    ("architectures", ["Qwen3MoeForCausalLM"]),
    ("head_dim", 0),
    ("head_dim", -192),
    ("head_dim", 192.5),
    ("head_dim", "192"),
    ("v_head_dim", True),
    ("vocab_size", 1 << 40),
    ("num_hidden_layers", None),
    ("num_experts_per_tok", 9),
    ("hybrid_layer_pattern", [0, 1, 1]),
    ("hybrid_layer_pattern", [0, 1, 1, 2]),
    ("hybrid_layer_pattern", [0, 1, 1, [0]]),
    ("hybrid_layer_pattern", "0110"),
    ("moe_layer_freq", [0, 1, 1, 1, 1]),
    ("moe_layer_freq", 1),
    ("num_attention_heads", 3),
    ("swa_num_attention_heads", 6),
    ("partial_rotary_factor", 0.35),
    ("partial_rotary_factor", 1.5),
    ("partial_rotary_factor", 0),
    ("layernorm_epsilon", float("nan")),
    ("rope_theta", float("inf")),
    ("sliding_window_size", 0),
    ("window_keys", 0),
    ("add_swa_attention_sink_bias", 1),
    ("norm_topk_prob", None),
    ("routed_scaling_factor", -1.0),
    ("attention_value_scale", "0.707"),
    # Fields that change the model, with a value that it does not implement.
    ("hidden_act", "gelu"),
    ("attention_bias", True),
    ("tie_word_embeddings", True),
    ("scoring_func", "softmax"),
    ("topk_method", "greedy"),
    ("n_shared_experts", 1),
    ("n_group", 8),
    ("topk_group", 2),
    ("attention_projection_layout", "fused_qkv"),
    ("moe_router_dtype", "bfloat16"),
    ("rope_scaling", {"type": "yarn", "factor": 4.0}),
    ("rope_parameters", {"sliding_attention": {"rope_type": "default", "rope_theta": 5e6}}),
    ("rope_parameters", [1]),
    ("sliding_window", 64),
]


@pytest.mark.parametrize(("field", "value"), REFUSED, ids=[f"{field}={value}" for field, value in REFUSED])
def test_a_wrong_field_is_refused_by_its_name_in_one_line(field, value):
    with pytest.raises(FormatError) as error:
        ModelArgs.from_dict(checkpoints.tiny_config() | {field: value})
    message = str(error.value)
    assert message.startswith("config.json: ")
    assert field in message
    assert "\n" not in message


def test_another_model_is_told_what_is_supported():
    with pytest.raises(FormatError, match=r"'mimo_v2' is another model; supported: mimo_v2_flash.*MiMo-V2-Flash"):
        ModelArgs.from_dict({"model_type": "mimo_v2"})


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(ModelArgs) if f.default is dataclasses.MISSING])
def test_a_missing_field_is_named(field):
    config = checkpoints.tiny_config()
    del config[field]
    with pytest.raises(FormatError, match=field):
        ModelArgs.from_dict(config)


def test_a_config_that_is_not_an_object_is_refused():
    with pytest.raises(FormatError, match=r"config\.json: a JSON object expected, list found"):
        ModelArgs.from_dict([])


def test_model_args_does_not_import_mlx():
    code = "import sys, mlx_mimo.config.model_args; sys.exit('mlx' in sys.modules or 'mlx.core' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
