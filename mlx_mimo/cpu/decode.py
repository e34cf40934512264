"""A decoder layer for a few tokens, computed on the host from end to end.

Waiting for an operation of MLX on the CPU takes tens of µs, longer than most of what a decode step does between its
matrices. So up to MAX_HOST_ROWS tokens the layer's sums, rotations and weights are computed with NumPy, and only the
cache is MLX's. With more tokens the model's own code runs.
"""

import functools

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..models.mimo_v2_flash import Attention, DecoderLayer, MoE
from .attention import attend, check_cache
from .host import host, on_host
from .modules import KernelLinear, KernelRMSNorm, KernelRouter
from .products import Stack, swiglu

MAX_HOST_ROWS = 32  # tokens times sequences


class HostDecoderLayer(DecoderLayer):
    """A DecoderLayer whose modules have kernels: the same parameters and results. `adopt` turns a layer into one."""

    def __call__(self, x: mx.array, mask: mx.array | str | None = None, cache=None) -> mx.array:
        """x (B, L, hidden) → (B, L, hidden) float32"""
        offset = getattr(cache, "offset", 0)
        if x.shape[0] * x.shape[1] > MAX_HOST_ROWS or not isinstance(offset, int):  # sequences of unequal length
            return super().__call__(x, mask, cache)
        compute = on_host(lambda x, *sinks: self._forward(x, mask, cache, *sinks))
        sinks = self.self_attn.attention_sink_bias
        return compute(x) if sinks is None else compute(x, sinks)

    def _forward(self, x: np.ndarray, mask, cache, sinks: np.ndarray | None = None) -> np.ndarray:
        x = x + self._attention(self.input_layernorm.compute(x), mask, cache, sinks)
        y = self.post_attention_layernorm.compute(x)
        y = self._moe(y) if isinstance(self.mlp, MoE) else self._dense(y)
        y += x
        return y

    def _attention(self, x: np.ndarray, mask, cache, sinks: np.ndarray | None) -> np.ndarray:
        attention, (batch, length, _) = self.self_attn, x.shape
        check_cache(cache)
        parts = self._qkv(x.reshape(-1, x.shape[-1]))
        heads = (attention.n_heads, attention.n_kv_heads, attention.n_kv_heads)
        queries, keys, values = (p.reshape(batch, length, n, -1).swapaxes(1, 2) for p, n in zip(parts, heads))
        turn = angles(attention.rope, 0 if cache is None else cache.offset, length)
        queries, keys = rotated(queries, *turn), rotated(keys, *turn)
        values = values * np.float32(attention.value_scale)
        if cache is not None:
            both = cache.update_and_fetch(mx.array(keys), mx.array(values))
            mx.eval(both)
            keys, values = (np.asarray(part) for part in both)
        out = attend(queries, keys, values, attention.scale, mask, sinks)
        return attention.o_proj.compute(out.swapaxes(1, 2).reshape(batch, length, -1))

    def _moe(self, x: np.ndarray) -> np.ndarray:
        rows = x.reshape(-1, x.shape[-1])  # done here, so that the experts' layer needs no MLX operation for it
        indices, weights = self.mlp.gate.compute(rows)
        y = host(self.mlp.switch_mlp(mx.array(rows), mx.array(indices)))
        return np.einsum("tkh,tk->th", y, weights).reshape(x.shape)

    def _dense(self, x: np.ndarray) -> np.ndarray:
        gate, up = self._gate_up(x.reshape(-1, x.shape[-1]))
        return self.mlp.down_proj.compute(swiglu(gate.copy(), up).reshape(*x.shape[:-1], -1))


def adopt(layer: DecoderLayer) -> None:
    """Turns `layer` into a HostDecoderLayer, in place; does nothing where one of its modules has no kernel."""
    attention, mlp = layer.self_attn, layer.mlp
    qkv = [attention.q_proj, attention.k_proj, attention.v_proj]
    dense = [] if isinstance(mlp, MoE) else [mlp.gate_proj, mlp.up_proj]
    linears = [*qkv, attention.o_proj, *dense, *([mlp.down_proj] if dense else [])]
    others = [layer.input_layernorm, layer.post_attention_layernorm, *([] if dense else [mlp.gate])]
    if not all(type(linear) is KernelLinear and "bias" not in linear for linear in linears):
        return
    if not all(type(module) in (KernelRMSNorm, KernelRouter) for module in others):
        return
    stacks = [[linear.packed for linear in group] for group in (qkv, dense) if group]
    if type(attention) is not Attention or not all(Stack.possible(group) for group in stacks):
        return
    # The class changes rather than the object, so that parameters keep their names and places.
    layer.__class__ = HostDecoderLayer
    layer._qkv = Stack(stacks[0])
    layer._gate_up = Stack(stacks[1]) if dense else None


def angles(rope: nn.RoPE, offset: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines, each (length, dims / 2), of `length` positions from `offset` on, as MLX computes them."""
    return _angles(rope.dims, rope.base, rope.scale, offset, length)


@functools.lru_cache(maxsize=8)  # layers of one kind ask for the same angles in turn
def _angles(dims: int, base: float, scale: float, offset: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    ones = mx.concatenate([mx.ones((1, 1, length, dims // 2)), mx.zeros((1, 1, length, dims // 2))], axis=-1)
    turned = mx.fast.rope(ones, dims, traditional=False, base=base, scale=scale, offset=offset)
    cosines, sines = np.split(host(turned)[0, 0], 2, axis=-1)
    return cosines, sines


def rotated(x: np.ndarray, cosines: np.ndarray, sines: np.ndarray) -> np.ndarray:
    """x (B, heads, L, head_dim) with its first dims rotated, as nn.RoPE(traditional=False) does."""
    half = cosines.shape[-1]
    y = np.ascontiguousarray(x)
    y = y.copy() if y is x else y
    first, second = x[..., :half], x[..., half : 2 * half]
    y[..., :half] = first * cosines - second * sines
    y[..., half : 2 * half] = first * sines + second * cosines
    return y
