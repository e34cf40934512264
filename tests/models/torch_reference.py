"""transformers' MiMoV2FlashForCausalLM on the weights of tests/support/checkpoints.py: what the model must equal."""

import numpy as np
import torch
from transformers import MiMoV2FlashConfig, MiMoV2FlashForCausalLM

torch.set_num_threads(1)

SAME_FIELDS = (
    "attention_bias",
    "attention_value_scale",
    "head_dim",
    "hidden_act",
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "moe_intermediate_size",
    "n_group",
    "n_routed_experts",
    "norm_topk_prob",
    "num_attention_heads",
    "num_experts_per_tok",
    "num_hidden_layers",
    "num_key_value_heads",
    "routed_scaling_factor",
    "tie_word_embeddings",
    "topk_group",
    "v_head_dim",
    "vocab_size",
)


def reference_config(config: dict, window: int | None = None) -> MiMoV2FlashConfig:
    """`window` is the number of keys seen. What transformers does not read from the hub's fields is set here."""
    layers = range(config["num_hidden_layers"])
    rope = {"rope_type": "default", "partial_rotary_factor": config["partial_rotary_factor"]}
    if config["swa_num_key_value_heads"] != 2 * config["num_key_value_heads"]:
        raise ValueError("transformers gives sliding layers twice the KV heads of global ones")
    return MiMoV2FlashConfig(
        **{name: config[name] for name in SAME_FIELDS},
        rms_norm_eps=config["layernorm_epsilon"],
        sliding_window=config["sliding_window_size"] + 1 if window is None else window,
        layer_types=["sliding_attention" if config["hybrid_layer_pattern"][i] else "full_attention" for i in layers],
        mlp_layer_types=["sparse" if config["moe_layer_freq"][i] else "dense" for i in layers],
        rope_parameters={
            "full_attention": {**rope, "rope_theta": config["rope_theta"]},
            "sliding_attention": {**rope, "rope_theta": config["swa_rope_theta"]},
        },
        attn_implementation="eager",
    )


def reference_model(config: dict, weights: dict[str, np.ndarray], window: int | None = None) -> MiMoV2FlashForCausalLM:
    model = MiMoV2FlashForCausalLM(reference_config(config, window)).float().eval()
    state = {}
    for name, value in weights.items():
        if ".experts." not in name and not name.startswith("model.mtp."):
            state[name.replace("attention_sink_bias", "sinks")] = value
    for layer in range(config["num_hidden_layers"]):
        if config["moe_layer_freq"][layer]:
            mlp = f"model.layers.{layer}.mlp.experts"

            def stack(projection: str, mlp: str = mlp) -> np.ndarray:
                return np.stack([weights[f"{mlp}.{e}.{projection}.weight"] for e in range(config["n_routed_experts"])])

            state[f"{mlp}.gate_up_proj"] = np.concatenate([stack("gate_proj"), stack("up_proj")], axis=1)
            state[f"{mlp}.down_proj"] = stack("down_proj")
    model.load_state_dict({name: torch.from_numpy(value.copy()) for name, value in state.items()}, strict=True)
    return model


def reference_logits(
    config: dict,
    weights: dict[str, np.ndarray],
    tokens: np.ndarray,
    window: int | None = None,
    attention_mask: np.ndarray | None = None,
) -> np.ndarray:
    """(B, L) → (B, L, vocab), float32. Positions count from each row's first unmasked token."""
    model = reference_model(config, weights, window)
    mask = None if attention_mask is None else torch.from_numpy(attention_mask)
    positions = None if mask is None else (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        out = model(torch.from_numpy(tokens), attention_mask=mask, position_ids=positions, use_cache=False)
    return out.logits.numpy()
