"""The tensors of a MiMo-V2-Flash checkpoint and their shapes, from config.json alone."""

from dataclasses import dataclass
from typing import Any

from ..errors import FormatError

SCALE = "_scale_inv"  # appended to a weight's name
MTP = "model.mtp."  # at the beginning of the names of multi-token prediction

Config = dict[str, Any]  # the fields of config.json


@dataclass(frozen=True)
class Shape:
    """One tensor of the checkpoint. `kind` groups tensors in tables of sizes and errors."""

    name: str
    shape: tuple[int, ...]
    kind: str
    dtype: str  # as released: F8_E4M3, BF16, F32


@dataclass(frozen=True)
class Heads:
    """Geometry of one kind of attention."""

    heads: int
    kv_heads: int
    head_dim: int
    v_head_dim: int


def size(config: Config, field: str) -> int:
    """A field that must be a positive whole number. Raises FormatError naming it."""
    value = config.get(field)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise FormatError(f"config.json: {field} is {value!r}, a positive whole number expected")
    return value


def layer_flags(config: Config, field: str) -> list[int]:
    """A field that must be a list of 0 and 1 with one entry a layer. Raises FormatError naming it."""
    layers = size(config, "num_hidden_layers")
    flags = config.get(field)
    if not isinstance(flags, list) or len(flags) != layers or any(flag not in (0, 1) for flag in flags):
        raise FormatError(f"config.json: {field} must be a list of {layers} zeros and ones, one a layer")
    return flags


def heads_of(config: Config, sliding: bool) -> Heads:
    prefix = "swa_" if sliding else ""
    names = ("num_attention_heads", "num_key_value_heads", "head_dim", "v_head_dim")
    return Heads(*(size(config, prefix + name) for name in names))


def global_layers(config: Config) -> list[int]:
    return [layer for layer, sliding in enumerate(layer_flags(config, "hybrid_layer_pattern")) if not sliding]


def moe_layers(config: Config) -> list[int]:
    return [layer for layer, moe in enumerate(layer_flags(config, "moe_layer_freq")) if moe]


def trunk_shapes(config: Config) -> list[Shape]:
    """The trunk's tensors, in the order in which a forward pass needs them."""
    hidden, vocabulary = size(config, "hidden_size"), size(config, "vocab_size")
    shapes = [Shape("model.embed_tokens.weight", (vocabulary, hidden), "embed_tokens", "BF16")]
    moe = set(moe_layers(config))
    for layer, sliding in enumerate(layer_flags(config, "hybrid_layer_pattern")):
        prefix = f"model.layers.{layer}"
        shapes.append(Shape(f"{prefix}.input_layernorm.weight", (hidden,), "norm", "BF16"))
        sinks = bool(config.get("add_swa_attention_sink_bias" if sliding else "add_full_attention_sink_bias"))
        kind = "sliding" if sliding else "global"
        shapes += _attention(f"{prefix}.self_attn", hidden, heads_of(config, bool(sliding)), sinks, kind)
        shapes.append(Shape(f"{prefix}.post_attention_layernorm.weight", (hidden,), "norm", "BF16"))
        if layer in moe:
            experts = size(config, "n_routed_experts")
            shapes.append(Shape(f"{prefix}.mlp.gate.weight", (experts, hidden), "router", "F32"))
            shapes.append(Shape(f"{prefix}.mlp.gate.e_score_correction_bias", (experts,), "router", "F32"))
        else:
            shapes += _mlp(f"{prefix}.mlp", hidden, size(config, "intermediate_size"), "dense")
    shapes.append(Shape("model.norm.weight", (hidden,), "norm", "BF16"))
    if not config.get("tie_word_embeddings"):
        shapes.append(Shape("lm_head.weight", (vocabulary, hidden), "lm_head", "BF16"))
    return shapes


def expert_shapes(config: Config, layer: int) -> list[Shape]:
    """The tensors of one layer's experts, one expert after another."""
    shapes = []
    for expert in range(size(config, "n_routed_experts")):
        prefix = f"model.layers.{layer}.mlp.experts.{expert}"
        shapes += _mlp(prefix, size(config, "hidden_size"), size(config, "moe_intermediate_size"), "experts")
    return shapes


def mtp_shapes(config: Config, layer: int) -> list[Shape]:
    """The tensors of one layer of multi-token prediction."""
    hidden, prefix = size(config, "hidden_size"), f"{MTP}layers.{layer}"
    norms = ("enorm", "hnorm", "input_layernorm", "pre_mlp_layernorm", "final_layernorm")
    sinks = bool(config.get("add_swa_attention_sink_bias"))
    return [
        *(Shape(f"{prefix}.{norm}.weight", (hidden,), "mtp.norm", "BF16") for norm in norms),
        Shape(f"{prefix}.eh_proj.weight", (hidden, 2 * hidden), "mtp.eh_proj", "BF16"),
        *_attention(f"{prefix}.self_attn", hidden, heads_of(config, True), sinks, "mtp"),
        *_mlp(f"{prefix}.mlp", hidden, size(config, "intermediate_size"), "mtp"),
    ]


def _attention(prefix: str, hidden: int, heads: Heads, sinks: bool, kind: str) -> list[Shape]:
    shapes = [
        Shape(f"{prefix}.q_proj.weight", (heads.heads * heads.head_dim, hidden), f"{kind}.q_proj", "F8_E4M3"),
        Shape(f"{prefix}.k_proj.weight", (heads.kv_heads * heads.head_dim, hidden), f"{kind}.k_proj", "F8_E4M3"),
        Shape(f"{prefix}.v_proj.weight", (heads.kv_heads * heads.v_head_dim, hidden), f"{kind}.v_proj", "F8_E4M3"),
        Shape(f"{prefix}.o_proj.weight", (hidden, heads.heads * heads.v_head_dim), f"{kind}.o_proj", "BF16"),
    ]
    if sinks:
        shapes.append(Shape(f"{prefix}.attention_sink_bias", (heads.heads,), "sink", "BF16"))
    return shapes


def _mlp(prefix: str, hidden: int, inner: int, kind: str) -> list[Shape]:
    return [
        Shape(f"{prefix}.gate_proj.weight", (inner, hidden), f"{kind}.gate_proj", "F8_E4M3"),
        Shape(f"{prefix}.up_proj.weight", (inner, hidden), f"{kind}.up_proj", "F8_E4M3"),
        Shape(f"{prefix}.down_proj.weight", (hidden, inner), f"{kind}.down_proj", "F8_E4M3"),
    ]
