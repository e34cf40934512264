"""The network in torch: transformers' MiMoV2FlashForCausalLM with this model's sizes, and the three MTP layers."""

import attention
import experts
import torch
from torch import nn
from transformers import MiMoV2FlashConfig, MiMoV2FlashForCausalLM
from transformers.models.mimo_v2_flash import modeling_mimo_v2_flash as reference

PATTERN = [0, 1, 1, 0, 1, 0]  # hybrid_layer_pattern: 0 global, 1 sliding
WINDOW = 32  # previous keys that a sliding layer sees, beside the query's own
MTP_LAYERS = 3
VOCABULARY = 1024
END_OF_TEXT, START, END = 1008, 1009, 1010


def config() -> MiMoV2FlashConfig:
    """Returns the sizes, all of them: transformers reads neither pattern nor thetas from a released config.json."""
    rope = {"rope_type": "default", "partial_rotary_factor": 0.334}
    return MiMoV2FlashConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=len(PATTERN),
        num_attention_heads=4,
        num_key_value_heads=2,  # global; transformers doubles it in sliding layers
        head_dim=192,
        v_head_dim=128,
        moe_intermediate_size=128,
        n_routed_experts=32,
        num_experts_per_tok=4,
        routed_scaling_factor=1.0,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        attention_value_scale=0.707,
        sliding_window=WINDOW + 1,  # transformers counts the query's own key
        layer_types=["sliding_attention" if p else "full_attention" for p in PATTERN],
        mlp_layer_types=["dense"] + ["sparse"] * (len(PATTERN) - 1),
        rope_parameters={
            "full_attention": {**rope, "rope_theta": 5_000_000.0},
            "sliding_attention": {**rope, "rope_theta": 10_000.0},
        },
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=None,
        attn_implementation="eager",
    )


class MTPLayer(nn.Module):
    """One multi-token prediction layer: a dense layer of sliding geometry over [embedding of a later token, h]."""

    def __init__(self, cfg: MiMoV2FlashConfig):
        super().__init__()
        norm = lambda: reference.MiMoV2FlashRMSNorm(cfg.hidden_size, cfg.rms_norm_eps)  # noqa: E731
        self.enorm, self.hnorm = norm(), norm()
        self.eh_proj = nn.Linear(2 * cfg.hidden_size, cfg.hidden_size, bias=False)
        self.input_layernorm = norm()
        self.self_attn = reference.MiMoV2FlashAttention(cfg, cfg.layer_types.index("sliding_attention"))
        self.pre_mlp_layernorm = norm()
        self.mlp = reference.MiMoV2FlashMLP(cfg)
        self.final_layernorm = norm()

    def forward(self, embedded, hidden, position_embeddings, mask):
        """(B, L, H) embeddings of the tokens ahead and (B, L, H) of the target's final hidden states → (B, L, H)."""
        x = self.eh_proj(torch.cat([self.enorm(embedded), self.hnorm(hidden)], -1))
        attended, _ = self.self_attn(
            self.input_layernorm(x), position_embeddings=position_embeddings, attention_mask=mask
        )
        x = x + attended
        x = x + self.mlp(self.pre_mlp_layernorm(x))
        return self.final_layernorm(x)


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        cfg = config()
        self.main = MiMoV2FlashForCausalLM(cfg)
        self.mtp = nn.ModuleList(MTPLayer(cfg) for _ in range(MTP_LAYERS))
        for name, p in self.mtp.named_parameters():
            if p.dim() == 2 or name.endswith("sinks"):
                nn.init.normal_(p, std=0.02)

    def hidden(self, ids):
        """(B, L) ids → (B, L, H) after the final norm."""
        return self.main.model(ids, use_cache=False).last_hidden_state

    def mtp_hidden(self, ids, hidden, k: int):
        """Layer k at position t: h_t and the embedding of token t+1+k; the head turns the result into token t+2+k.

        The last k+1 positions have no such token and wrap round; callers leave them out of the loss.
        """
        length = ids.shape[1]
        embedded = self.main.model.embed_tokens(ids.roll(-1 - k, 1)).detach()
        positions = torch.arange(length, device=ids.device)
        rope = self.main.model.rotary_emb(hidden, positions[None], "sliding_attention")
        distance = positions[:, None] - positions[None]
        seen = (distance >= 0) & (distance <= WINDOW)
        mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None].to(hidden.device)
        return self.mtp[k](embedded, hidden, rope, mask)

    def routers(self) -> list:
        return [layer.mlp.gate for layer in self.main.model.layers if hasattr(layer.mlp, "gate")]


def speed_up() -> None:
    """Installs the faster attention and sum over experts, and keeps the router in float32 under autocast."""
    reference.eager_attention_forward = attention.forward
    reference.MiMoV2FlashExperts.forward = experts.forward
    route = reference.MiMoV2FlashTopkRouter.forward

    def route_in_float32(self, hidden_states):
        with torch.autocast(hidden_states.device.type, enabled=False):
            return route(self, hidden_states.float())

    reference.MiMoV2FlashTopkRouter.forward = route_in_float32
