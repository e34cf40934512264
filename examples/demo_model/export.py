"""Writes the trained network as the release is: file naming, tensor names, FP8 with 128x128 scales, the K/V chain."""

import argparse
import json
import shutil
from pathlib import Path

import network
import torch
from safetensors.torch import save_file

BLOCK = 128
FP8_MAX = 448.0
SLIDING_KV_HEADS, GLOBAL_KV_HEADS = 4, 2
HEAD, VALUE = 192, 128


def _codes(weight: torch.Tensor, scale_rows: torch.Tensor) -> torch.Tensor:
    """FP8 codes of (R, C) `weight`, with one row of scales, (R, ceil(C/128)), for every row."""
    scale = scale_rows.repeat_interleave(BLOCK, 1)[:, : weight.shape[1]]
    return (weight / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)


def quantise(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(R, C) → FP8 codes and float32 scales (ceil(R/128), ceil(C/128)), each block scaled to its largest magnitude."""
    weight = weight.float()
    rows, columns = -(-weight.shape[0] // BLOCK), -(-weight.shape[1] // BLOCK)
    padded = torch.zeros(rows * BLOCK, columns * BLOCK)
    padded[: weight.shape[0], : weight.shape[1]] = weight
    scale = padded.view(rows, BLOCK, columns, BLOCK).abs().amax((1, 3)) / FP8_MAX
    return _codes(weight, scale.repeat_interleave(BLOCK, 0)[: weight.shape[0]]), scale


def quantise_chain(k: torch.Tensor, v: torch.Tensor, heads: int) -> tuple:
    """K and V of a global layer: per KV head the 320 rows [K_h | V_h] are one chain of 128-row blocks.

    Returns k codes, k scales (2 a head), v codes, v scales (1 a head): the middle block, whose scale stands among K's,
    holds K rows 128..191 and V rows 0..63.
    """
    ks, vs, kc, vc = [], [], [], []
    for h in range(heads):
        chain = torch.cat([k[h * HEAD : (h + 1) * HEAD], v[h * VALUE : (h + 1) * VALUE]]).float()
        codes, scale = quantise(chain)
        kc.append(codes[:HEAD])
        vc.append(codes[HEAD:])
        ks.append(scale[:2])
        vs.append(scale[2:])
    return torch.cat(kc), torch.cat(ks), torch.cat(vc), torch.cat(vs)


class Checkpoint:
    """Collects tensors by file, then writes files and index."""

    def __init__(self):
        self.files: dict[str, dict[str, torch.Tensor]] = {}

    def put(self, file: str, name: str, tensor: torch.Tensor) -> None:
        self.files.setdefault(file, {})[name] = tensor.detach().cpu().contiguous()

    def bf16(self, file: str, name: str, tensor: torch.Tensor) -> None:
        self.put(file, name, tensor.to(torch.bfloat16))

    def fp8(self, file: str, name: str, tensor: torch.Tensor) -> None:
        self.coded(file, name, *quantise(tensor.detach().cpu()))

    def coded(self, file: str, name: str, codes: torch.Tensor, scale: torch.Tensor) -> None:
        self.put(file, name, codes)
        self.put(file, name + "_scale_inv", scale)

    def attention(self, file: str, prefix: str, attn, sliding: bool) -> None:
        self.fp8(file, prefix + "q_proj.weight", attn.q_proj.weight)
        if sliding:
            self.fp8(file, prefix + "k_proj.weight", attn.k_proj.weight)
            self.fp8(file, prefix + "v_proj.weight", attn.v_proj.weight)
            self.bf16(file, prefix + "attention_sink_bias", attn.sinks)
        else:
            kc, ks, vc, vs = quantise_chain(
                attn.k_proj.weight.detach().cpu(), attn.v_proj.weight.detach().cpu(), GLOBAL_KV_HEADS
            )
            self.coded(file, prefix + "k_proj.weight", kc, ks)
            self.coded(file, prefix + "v_proj.weight", vc, vs)
        self.bf16(file, prefix + "o_proj.weight", attn.o_proj.weight)

    def mlp(self, file: str, prefix: str, mlp) -> None:
        for part in ("gate_proj", "up_proj", "down_proj"):
            self.fp8(file, f"{prefix}{part}.weight", getattr(mlp, part).weight)

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("*.safetensors"):
            old.unlink()
        places, size = {}, 0
        for file, tensors in sorted(self.files.items()):
            save_file(dict(sorted(tensors.items())), folder / f"{file}.safetensors", {"format": "pt"})
            places.update(dict.fromkeys(tensors, f"{file}.safetensors"))
            size += sum(t.numel() * t.element_size() for t in tensors.values())
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def collect(net: network.Network) -> Checkpoint:
    out = Checkpoint()
    model = net.main.model
    out.bf16("model_embedding", "model.embed_tokens.weight", model.embed_tokens.weight)
    out.bf16("model_final", "model.norm.weight", model.norm.weight)
    out.bf16("model_final", "lm_head.weight", net.main.lm_head.weight)
    for i, layer in enumerate(model.layers):
        file, prefix = f"model_{i}", f"model.layers.{i}."
        out.attention(file, prefix + "self_attn.", layer.self_attn, bool(network.PATTERN[i]))
        for norm in ("input_layernorm", "post_attention_layernorm"):
            out.bf16(file, f"{prefix}{norm}.weight", getattr(layer, norm).weight)
        if not hasattr(layer.mlp, "gate"):
            out.mlp(file, prefix + "mlp.", layer.mlp)
            continue
        out.put(file, prefix + "mlp.gate.weight", layer.mlp.gate.weight.float())
        out.put(file, prefix + "mlp.gate.e_score_correction_bias", layer.mlp.gate.e_score_correction_bias.float())
        experts = layer.mlp.experts
        for e in range(experts.num_experts):
            gate, up = experts.gate_up_proj[e].chunk(2)
            name = f"{prefix}mlp.experts.{e}."
            out.fp8(file + "_linear_fc1", name + "gate_proj.weight", gate)
            out.fp8(file + "_linear_fc1", name + "up_proj.weight", up)
            out.fp8(file + "_linear_fc2", name + "down_proj.weight", experts.down_proj[e])
    for k, layer in enumerate(net.mtp):
        prefix = f"model.mtp.layers.{k}."
        out.attention("model_mtp", prefix + "self_attn.", layer.self_attn, True)
        out.mlp("model_mtp", prefix + "mlp.", layer.mlp)
        out.bf16("model_mtp", prefix + "eh_proj.weight", layer.eh_proj.weight)
        for norm in ("enorm", "hnorm", "input_layernorm", "pre_mlp_layernorm", "final_layernorm"):
            out.bf16("model_mtp", f"{prefix}{norm}.weight", getattr(layer, norm).weight)
    return out


def released_config() -> dict:
    """config.json with the release's fields."""
    cfg = network.config()
    layers = cfg.num_hidden_layers
    ignored = [f"model.layers.{i}.self_attn.o_proj" for i in range(layers)] + ["model.decoder.self_attn.o_proj"]
    return {
        "architectures": ["MiMoV2FlashForCausalLM"],
        "model_type": "mimo_v2_flash",
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.hidden_size,
        "intermediate_size": cfg.intermediate_size,
        "moe_intermediate_size": cfg.moe_intermediate_size,
        "num_hidden_layers": layers,
        "n_routed_experts": cfg.n_routed_experts,
        "num_experts_per_tok": cfg.num_experts_per_tok,
        "n_shared_experts": None,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": None,
        "moe_layer_freq": [0] + [1] * (layers - 1),
        "num_attention_heads": cfg.num_attention_heads,
        "num_key_value_heads": GLOBAL_KV_HEADS,
        "head_dim": HEAD,
        "v_head_dim": VALUE,
        "swa_num_attention_heads": cfg.num_attention_heads,
        "swa_num_key_value_heads": SLIDING_KV_HEADS,
        "swa_head_dim": HEAD,
        "swa_v_head_dim": VALUE,
        "hybrid_layer_pattern": network.PATTERN,
        "sliding_window": network.WINDOW,
        "sliding_window_size": network.WINDOW,
        "attention_chunk_size": network.WINDOW,
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
        "attention_value_scale": 0.707,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "partial_rotary_factor": 0.334,
        "rope_theta": 5_000_000,
        "swa_rope_theta": 10_000,
        "layernorm_epsilon": 1e-5,
        "max_position_embeddings": 4096,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "eos_token_id": network.END,
        "pad_token_id": network.END_OF_TEXT,
        "quantization_config": {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [BLOCK, BLOCK],
            "ignored_layers": ignored,
        },
    }


def export(trained: Path, tokenizer: Path, folder: Path) -> None:
    state = torch.load(trained, map_location="cpu")
    net = network.Network()
    net.load_state_dict(state["net"])
    collect(net).write(folder)
    (folder / "config.json").write_text(json.dumps(released_config(), indent=2) + "\n")
    generation = {
        "do_sample": False,
        "eos_token_id": [network.END_OF_TEXT, network.END],
        "pad_token_id": network.END_OF_TEXT,
    }
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tokenizer / file, folder / file)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trained", type=Path, default=Path("build/demo/train.pt"))
    parser.add_argument("--tokenizer", type=Path, default=Path("build/demo/tokenizer"))
    parser.add_argument("--to", type=Path, default=Path("mlx_mimo/demo/checkpoint"))
    arguments = parser.parse_args()
    export(arguments.trained, arguments.tokenizer, arguments.to)
