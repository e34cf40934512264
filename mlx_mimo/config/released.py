"""The config.json of the released MiMo-V2-Flash, by its published facts, so that `plan` needs no download."""

from typing import Any

NAME = "MiMo-V2-Flash"
REPOS = ("XiaomiMiMo/MiMo-V2-Flash", "XiaomiMiMo/MiMo-V2-Flash-Base")
GLOBAL_LAYERS = (0, 5, 11, 17, 23, 29, 35, 41, 47)
LAYERS = 48

CONFIG: dict[str, Any] = {
    "architectures": ["MiMoV2FlashForCausalLM"],
    "model_type": "mimo_v2_flash",
    "vocab_size": 152576,
    "hidden_size": 4096,
    "num_hidden_layers": LAYERS,
    "hybrid_layer_pattern": [0 if layer in GLOBAL_LAYERS else 1 for layer in range(LAYERS)],
    "intermediate_size": 16384,
    "moe_intermediate_size": 2048,
    "moe_layer_freq": [0] + [1] * (LAYERS - 1),
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "n_shared_experts": None,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": None,
    "num_attention_heads": 64,
    "num_key_value_heads": 4,
    "head_dim": 192,
    "v_head_dim": 128,
    "swa_num_attention_heads": 64,
    "swa_num_key_value_heads": 8,
    "swa_head_dim": 192,
    "swa_v_head_dim": 128,
    "sliding_window": 128,
    "sliding_window_size": 128,
    "add_swa_attention_sink_bias": True,
    "add_full_attention_sink_bias": False,
    "attention_value_scale": 0.707,
    "attention_bias": False,
    "partial_rotary_factor": 0.334,
    "rope_theta": 5000000,
    "swa_rope_theta": 10000,
    "layernorm_epsilon": 1e-5,
    "hidden_act": "silu",
    "max_position_embeddings": 262144,
    "tie_word_embeddings": False,
}
