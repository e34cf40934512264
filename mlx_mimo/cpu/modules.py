"""Modules that replace MLX's on the CPU: the same parameters, the same results in float32, the speed of the kernels.

`adapt.use_cpu_kernels` puts them into a loaded model. Each waits for its input, computes on the host and returns an
evaluated array. So they raise MimoError inside grad, vmap and compile, and when a parameter is replaced, as grad does:
the kernels read the parameters that the module was made with.
"""

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..errors import MimoError
from .host import NO_TRANSFORM, host, on_host
from .packed import Packed, format_of
from .products import ExpertMatrices, matmul, run_experts

_FIXED = NO_TRANSFORM.format("gradient and take no other weights")


def _rows(x: np.ndarray) -> np.ndarray:
    return x.reshape(-1, x.shape[-1])


def _pack(module: nn.Module) -> Packed:
    if "scales" not in module:
        return Packed(module.weight)
    return Packed(
        module.weight,
        module.scales,
        module.get("biases"),
        bits=module.bits,
        group_size=module.group_size,
        mode=getattr(module, "mode", "affine"),
    )


def has_kernel(module: nn.Module) -> bool:
    """Whether the kernels read the format of a Linear, QuantizedLinear or embedding."""
    if "scales" not in module:
        return format_of(module.weight.dtype) is not None
    if module["scales"].dtype not in (mx.bfloat16, mx.float16, mx.float32, mx.uint8):
        return False
    mode = getattr(module, "mode", "affine")
    return format_of(module.weight.dtype, module.bits, module.group_size, mode) is not None


class KernelModule(nn.Module):
    """A module whose parameters are read in place. Replacing one raises MimoError, since kernels would not see it."""

    def __setitem__(self, name: str, value) -> None:
        if isinstance(value, mx.array) and self.get(name, value) is not value:
            raise MimoError(f"{type(self).__name__}.{name}: " + _FIXED)
        super().__setitem__(name, value)


class PackedModule(KernelModule):
    """The weights of a linear layer, an embedding or a stack of linear layers, quantised or not."""

    def __init__(self, module: nn.Module):
        super().__init__()
        for name in ("weight", "scales", "biases", "bias"):
            if module.get(name) is not None:
                self[name] = module[name]
        for name in ("bits", "group_size", "mode"):
            if hasattr(module, name):
                setattr(self, name, getattr(module, name))
        self.packed = _pack(self)


class KernelLinear(PackedModule):
    """nn.Linear or nn.QuantizedLinear through the kernels: x (..., in) → (..., out) float32."""

    def __init__(self, linear: nn.Module):
        super().__init__(linear)
        self._function = on_host(self.compute)
        self.freeze()

    def compute(self, x: np.ndarray) -> np.ndarray:
        """`__call__` for NumPy arrays, without the bias."""
        return matmul(_rows(x), self.packed).reshape(*x.shape[:-1], -1)

    def __call__(self, x: mx.array) -> mx.array:
        y = self._function(x)
        return y + self.bias if "bias" in self else y


class KernelRMSNorm(KernelModule):
    """nn.RMSNorm on the host: x (..., hidden) → float32."""

    def __init__(self, norm: nn.RMSNorm):
        super().__init__()
        self.weight, self.eps = norm.weight.astype(mx.float32), norm.eps
        self._weight = host(self.weight)
        self._function = on_host(self.compute)
        self.freeze()

    def compute(self, x: np.ndarray) -> np.ndarray:
        """`__call__` for NumPy arrays."""
        squares = np.einsum("...i,...i->...", x, x)[..., None]
        y = x / np.sqrt(squares / np.float32(x.shape[-1]) + np.float32(self.eps))
        y *= self._weight
        return y

    def __call__(self, x: mx.array) -> mx.array:
        return self._function(x)


class KernelEmbedding(PackedModule):
    """nn.Embedding or nn.QuantizedEmbedding with scales that stay 16-bit: rows become float32 when looked up."""

    def __init__(self, embedding: nn.Module):
        super().__init__(embedding)
        self._as_linear = on_host(lambda x: matmul(_rows(x), self.packed).reshape(*x.shape[:-1], -1))
        self.freeze()

    def __call__(self, tokens: mx.array) -> mx.array:
        if "scales" not in self:
            return self.weight[tokens].astype(mx.float32)
        scales, biases = self.scales[tokens], self.get("biases")
        if self.mode == "affine":
            scales, biases = scales.astype(mx.float32), self.biases[tokens].astype(mx.float32)
        return mx.dequantize(
            self.weight[tokens],
            scales,
            biases,
            group_size=self.group_size,
            bits=self.bits,
            mode=self.mode,
            dtype=mx.float32,
        )

    def as_linear(self, x: mx.array) -> mx.array:
        return self._as_linear(x)


class KernelSwitchGLU(nn.Module):
    """mlx-lm's SwitchGLU with stacked experts: x (..., hidden), indices (..., K) → (..., K, hidden)."""

    def __init__(self, switch: nn.Module):
        super().__init__()
        self.gate_proj, self.up_proj = PackedModule(switch.gate_proj), PackedModule(switch.up_proj)
        self.down_proj = PackedModule(switch.down_proj)
        self._expert = ExpertMatrices(self.gate_proj.packed, self.up_proj.packed, self.down_proj.packed)
        self.freeze()

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        def compute(x: np.ndarray) -> np.ndarray:
            return run_experts(_rows(x), slots.reshape(-1, slots.shape[-1]), self._expert).reshape(*slots.shape, -1)

        slots = np.array(indices).astype(np.int32)
        return on_host(compute)(x)


class KernelRouter(KernelModule):
    """The model's Router on the host: x (..., hidden) → indices (..., top_k), weights (..., top_k)."""

    def __init__(self, router: nn.Module):
        super().__init__()
        self.weight = router.weight.astype(mx.float32)
        self.e_score_correction_bias = router.e_score_correction_bias.astype(mx.float32)
        self.top_k, self.norm_topk_prob, self.scale = router.top_k, router.norm_topk_prob, router.scale
        self._packed = Packed(self.weight)
        self._bias = host(self.e_score_correction_bias)
        self._function = on_host(self._scores)
        self.freeze()

    def _scores(self, x: np.ndarray) -> np.ndarray:
        logits = matmul(_rows(x), self._packed)
        with np.errstate(over="ignore"):
            return (1.0 / (1.0 + np.exp(-logits))).reshape(*x.shape[:-1], -1)

    def compute(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`__call__` for NumPy arrays."""
        return self._choose(self._scores(x))

    def _choose(self, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        indices = np.argpartition(-(scores + self._bias), self.top_k - 1, axis=-1)[..., : self.top_k]
        weights = np.take_along_axis(scores, indices, axis=-1)
        if self.norm_topk_prob:
            weights = weights / (weights.sum(axis=-1, keepdims=True) + 1e-20)
        return indices.astype(np.uint32), weights * np.float32(self.scale)

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array]:
        indices, weights = self._choose(host(self._function(x)))
        return mx.array(indices), mx.array(weights)
