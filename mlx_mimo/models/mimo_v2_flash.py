"""MiMo-V2-Flash: hybrid attention with sinks, a float32 sigmoid router, gather-based experts.

Parameters are named as in mlx-lm's own mimo_v2_flash, so that one converted directory serves both.
"""

import re
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.activations import swiglu
from mlx_lm.models.base import create_attention_mask, scaled_dot_product_attention
from mlx_lm.models.switch_layers import SwitchGLU

from ..config.model_args import ModelArgs
from ..errors import FormatError
from .cache import make_cache
from .precision import float32_matmul

_EXPERT_TENSOR = re.compile(r"(model\.layers\.\d+\.mlp)\.experts\.(\d+)\.((?:gate|up|down)_proj\.\w+)")
_MTP = "model.mtp."


class Attention(nn.Module):
    def __init__(self, args: ModelArgs, layer: int):
        super().__init__()
        hidden = args.hidden_size
        self.n_heads, self.n_kv_heads = args.heads(layer), args.kv_heads(layer)
        head_dim, v_head_dim = args.head_dims(layer)
        self.scale = head_dim**-0.5
        self.attend = scaled_dot_product_attention  # a backend may replace it
        self.value_scale = args.value_scale

        self.q_proj = nn.Linear(hidden, self.n_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(hidden, self.n_kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(hidden, self.n_kv_heads * v_head_dim, bias=False)
        self.o_proj = nn.Linear(self.n_heads * v_head_dim, hidden, bias=False)
        self.attention_sink_bias = mx.zeros((self.n_heads,)) if args.has_sinks(layer) else None
        self.rope = nn.RoPE(args.rotary_dims(layer), traditional=False, base=args.theta(layer))

    def __call__(self, x: mx.array, mask: mx.array | str | None = None, cache: Any = None) -> mx.array:
        """x: (B, L, hidden) → (B, L, hidden)"""
        B, L, _ = x.shape
        offset = 0 if cache is None else cache.offset
        queries = self.q_proj(x).reshape(B, L, self.n_heads, -1).transpose(0, 2, 1, 3)
        queries = self.rope(queries, offset=offset)
        keys, values = self.remember(x, cache)
        sinks = self.attention_sink_bias
        output = self.attend(
            queries,
            keys,
            values,
            cache=cache,
            scale=self.scale,
            mask=mask,
            sinks=None if sinks is None else sinks.astype(queries.dtype),
        )
        return self.o_proj(output.transpose(0, 2, 1, 3).reshape(B, L, -1))

    def remember(self, x: mx.array, cache: Any = None) -> tuple[mx.array, mx.array]:
        """Appends the keys and values of x (B, L, hidden) to the cache; returns all those that x's queries see."""
        B, L, _ = x.shape
        keys = self.k_proj(x).reshape(B, L, self.n_kv_heads, -1).transpose(0, 2, 1, 3)
        values = self.v_proj(x).reshape(B, L, self.n_kv_heads, -1).transpose(0, 2, 1, 3) * self.value_scale
        if cache is None:
            return self.rope(keys), values
        return cache.update_and_fetch(self.rope(keys, offset=cache.offset), values)


class MLP(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.gate_proj = nn.Linear(args.hidden_size, args.intermediate_size, bias=False)
        self.up_proj = nn.Linear(args.hidden_size, args.intermediate_size, bias=False)
        self.down_proj = nn.Linear(args.intermediate_size, args.hidden_size, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class Router(nn.Module):
    """Chooses each token's experts, in float32 throughout: in bfloat16, 2–3 % of tokens would get other experts."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.top_k = args.num_experts_per_tok
        self.norm_topk_prob = args.norm_topk_prob
        self.scale = args.router_scale
        self.weight = mx.zeros((args.n_routed_experts, args.hidden_size))
        self.e_score_correction_bias = mx.zeros((args.n_routed_experts,))

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """x: (..., hidden) → expert indices (..., top_k), their float32 weights (..., top_k)"""
        scores = mx.sigmoid(float32_matmul(x, self.weight))
        # The bias balances load: it changes which experts are chosen, not their weights.
        choice = scores + self.e_score_correction_bias.astype(mx.float32)
        indices = mx.argpartition(-choice, kth=self.top_k - 1, axis=-1)[..., : self.top_k]
        indices = mx.stop_gradient(indices)  # training through take_along_axis wants them constant
        weights = mx.take_along_axis(scores, indices, axis=-1)
        if self.norm_topk_prob:
            weights = weights / (weights.sum(axis=-1, keepdims=True) + 1e-20)
        return indices, weights * self.scale


class MoE(nn.Module):
    """A router and its experts. `switch_mlp` maps x (..., hidden) and indices (..., top_k) to (..., top_k, hidden); a
    module that keeps its experts elsewhere can replace it.
    """

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.gate = Router(args)
        self.switch_mlp = SwitchGLU(args.hidden_size, args.moe_intermediate_size, args.n_routed_experts)

    def __call__(self, x: mx.array) -> mx.array:
        indices, weights = self.gate(x)
        y = self.switch_mlp(x, indices)
        return (y * weights[..., None]).sum(axis=-2).astype(x.dtype)


class DecoderLayer(nn.Module):
    def __init__(self, args: ModelArgs, layer: int):
        super().__init__()
        self.is_sliding = args.is_sliding(layer)
        self.self_attn = Attention(args, layer)
        self.mlp = MoE(args) if args.is_moe(layer) else MLP(args)
        self.input_layernorm = nn.RMSNorm(args.hidden_size, eps=args.layernorm_epsilon)
        self.post_attention_layernorm = nn.RMSNorm(args.hidden_size, eps=args.layernorm_epsilon)

    def __call__(self, x: mx.array, mask: mx.array | str | None = None, cache: Any = None) -> mx.array:
        h = x + self.self_attn(self.input_layernorm(x), mask, cache)
        return h + self.mlp(self.post_attention_layernorm(h))

    def remember(self, x: mx.array, cache: Any) -> None:
        """Appends the keys and values of x to the cache and computes nothing else of this layer."""
        self.self_attn.remember(self.input_layernorm(x), cache)


class LanguageModel(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.embed_tokens = nn.Embedding(args.vocab_size, args.hidden_size)
        self.layers = [DecoderLayer(args, layer) for layer in range(args.num_hidden_layers)]
        self.norm = nn.RMSNorm(args.hidden_size, eps=args.layernorm_epsilon)
        self.window = args.window

    def __call__(
        self, inputs: mx.array, cache: list | None = None, input_embeddings: mx.array | None = None
    ) -> mx.array:
        """Token ids (B, L) → hidden states after the final norm (B, L, hidden)"""
        h = self.embed_tokens(inputs) if input_embeddings is None else input_embeddings
        masks = self._masks(h, cache)
        for i, layer in enumerate(self.layers):
            h = layer(h, masks[layer.is_sliding], None if cache is None else cache[i])
        return self.norm(h)

    def prefill(self, inputs: mx.array, cache: list, input_embeddings: mx.array | None = None) -> None:
        """As a call, but only updates the cache: the last layer computes no more than its keys and values."""
        h = self.embed_tokens(inputs) if input_embeddings is None else input_embeddings
        masks = self._masks(h, cache)
        for layer, c in zip(self.layers[:-1], cache):
            h = layer(h, masks[layer.is_sliding], c)
        self.layers[-1].remember(h, cache[-1])

    def _masks(self, h: mx.array, cache: list | None) -> dict[bool, mx.array | str | None]:
        """{is_sliding: mask}: layers of one kind share theirs."""
        masks = {}
        for i, layer in enumerate(self.layers):
            if layer.is_sliding not in masks:
                window = self.window if layer.is_sliding else None
                masks[layer.is_sliding] = create_attention_mask(h, cache and cache[i], window_size=window)
        return masks


class Model(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.model_type = args.model_type
        self.model = LanguageModel(args)
        self.lm_head = nn.Linear(args.hidden_size, args.vocab_size, bias=False)

    def __call__(
        self, inputs: mx.array, cache: list | None = None, input_embeddings: mx.array | None = None
    ) -> mx.array:
        """Token ids (B, L) → logits (B, L, vocab). `cache` is one of `make_cache`, and is updated."""
        return self.lm_head(self.model(inputs, cache, input_embeddings))

    def prefill(self, inputs: mx.array, cache: list, input_embeddings: mx.array | None = None) -> None:
        """Updates the cache as a call does and returns nothing: the last layer's experts and the head are left out."""
        self.model.prefill(inputs, cache, input_embeddings)

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Renames the tensors of a converted directory, or of an unquantised HF checkpoint, to this model's names.

        Experts are stacked; a layer without any stays without, since its experts may be kept elsewhere. The layers for
        multi-token prediction are left out. Raises FormatError for FP8 weights, and where some experts of a layer are
        missing.
        """
        scale = next((name for name in weights if name.endswith("_scale_inv")), None)
        if scale is not None:
            raise FormatError(f"{scale}: this is an FP8 checkpoint; convert it first with python -m mlx_mimo.convert")
        experts: dict[str, dict[int, mx.array]] = {}
        result = {}
        for name, value in weights.items():
            match = _EXPERT_TENSOR.fullmatch(name)
            if match:
                experts.setdefault(f"{match[1]}.switch_mlp.{match[3]}", {})[int(match[2])] = value
            elif not name.startswith(_MTP):
                result[name] = value
        count = self.args.n_routed_experts
        for name, by_number in experts.items():
            missing = set(range(count)) - by_number.keys()
            if missing or len(by_number) != count:
                raise FormatError(
                    f"{name}: {len(by_number)} experts found, {count} expected; fetch or convert the model again"
                )
            result[name] = mx.stack([by_number[expert] for expert in range(count)])
        return result

    @property
    def layers(self) -> list[DecoderLayer]:
        return self.model.layers

    def make_cache(self) -> list:
        return make_cache(self.args)

    @property
    def cast_predicate(self):
        """For mlx-lm: says whether a parameter may be cast; the router's may not."""
        return lambda name: ".mlp.gate." not in name

    @property
    def quant_predicate(self):
        """For mlx-lm's converter: experts are quantised as asked, every other matrix to 8 bits."""

        def predicate(path: str, module: nn.Module) -> bool | dict:
            if not hasattr(module, "to_quantized"):
                return False
            return True if ".switch_mlp." in path else {"group_size": 64, "bits": 8}

        return predicate
