"""Modules that stand in for MLX's on the CPU: same parameters, same results in float32, the kernels' speed.

`use_cpu_kernels` swaps them into a loaded model. Each waits for its input, computes on the host and returns a finished
array, so none of them can take part in grad, vmap or compile: they refuse rather than answer with zeros. Nor can their
parameters be replaced, as grad does: the kernels read those that the module was made with.
"""

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.switch_layers import SwitchGLU

from ..errors import MimoError
from .packed import Expert, Packed, experts, format_of, matmul

_WHY = "CPU kernels have no {}; load the model with MLX's own operations for that (MLX_MIMO_CPU_KERNELS=0)"


def on_host(compute: Callable[..., np.ndarray | list[np.ndarray]]) -> Callable:
    """A function of arrays from one of as many NumPy arrays; raises MimoError inside a transformation."""

    @mx.custom_function
    def function(*arrays: mx.array):
        result = compute(*map(host, arrays))
        return [mx.array(part) for part in result] if isinstance(result, list) else mx.array(result)

    @function.vjp
    def _(*_):
        raise MimoError(_WHY.format("gradient"))

    @function.jvp
    def _(*_):
        raise MimoError(_WHY.format("forward derivative"))

    @function.vmap
    def _(*_):
        raise MimoError(_WHY.format("vmap"))

    return function


def host(x: mx.array) -> np.ndarray:
    """x as contiguous float32 in host memory, in place where it is that already; waits for it."""
    try:
        # No operation of MLX where none is needed: to wait for one takes longer than many a kernel here.
        return np.ascontiguousarray(x if x.dtype == mx.float32 else x.astype(mx.float32))
    except ValueError as error:  # "Attempting to eval an array during function transformations"
        raise MimoError(_WHY.format("compile or vmap")) from error


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
    """Whether a Linear, QuantizedLinear or embedding is of a format that the kernels know."""
    if "scales" not in module:
        return format_of(module.weight.dtype) is not None
    if module["scales"].dtype not in (mx.bfloat16, mx.float16, mx.float32, mx.uint8):
        return False
    mode = getattr(module, "mode", "affine")
    return format_of(module.weight.dtype, module.bits, module.group_size, mode) is not None


class KernelModule(nn.Module):
    """Parameters that kernels read where they lie. Replacing one raises MimoError: it would be ignored in silence."""

    def __setitem__(self, name: str, value) -> None:
        if isinstance(value, mx.array) and self.get(name, value) is not value:
            raise MimoError(f"{type(self).__name__}.{name}: " + _WHY.format("gradient and take no other weights"))
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
        """As a call, of NumPy arrays and without the bias."""
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
        """As a call, of NumPy arrays."""
        squares = np.einsum("...i,...i->...", x, x)[..., None]
        y = x / np.sqrt(squares / np.float32(x.shape[-1]) + np.float32(self.eps))
        y *= self._weight
        return y

    def __call__(self, x: mx.array) -> mx.array:
        return self._function(x)


class KernelEmbedding(PackedModule):
    """nn.QuantizedEmbedding with scales that stay 16-bit: rows are made float32 when they are looked up."""

    def __init__(self, embedding: nn.Module):
        super().__init__(embedding)
        self._as_linear = on_host(lambda x: matmul(_rows(x), self.packed).reshape(*x.shape[:-1], -1))
        self.freeze()

    def __call__(self, tokens: mx.array) -> mx.array:
        if "scales" not in self:
            return self.weight[tokens].astype(mx.float32)
        scales, biases = self.scales[tokens], self.get("biases")
        if self.mode == "affine":
            scales, biases = scales.astype(mx.float32), biases[tokens].astype(mx.float32)
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
    """mlx-lm's SwitchGLU, stacked experts all resident: x (..., hidden), indices (..., K) → (..., K, hidden)."""

    def __init__(self, switch: nn.Module):
        super().__init__()
        self.gate_proj, self.up_proj = PackedModule(switch.gate_proj), PackedModule(switch.up_proj)
        self.down_proj = PackedModule(switch.down_proj)
        self._expert = Expert(self.gate_proj.packed, self.up_proj.packed, self.down_proj.packed)
        self.freeze()

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        def compute(x: np.ndarray) -> np.ndarray:
            return experts(_rows(x), slots.reshape(-1, slots.shape[-1]), self._expert).reshape(*slots.shape, -1)

        slots = np.array(indices).astype(np.int32)
        return on_host(compute)(x)


class KernelRouter(KernelModule):
    """Chooses experts as the model's Router does, on the host: x (..., hidden) → indices, weights (..., top_k)."""

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
        """As a call, of NumPy arrays."""
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


def use_cpu_kernels(model: nn.Module) -> nn.Module:
    """Swaps the modules that the kernels can do better into `model`, in place; what remains becomes float32.

    Quantised weights and their scales stay as they are. Formats without kernels keep MLX's operations in float32.
    """
    from ..models.mimo_v2_flash import Attention, Router
    from .attention import attention
    from .decode import adopt

    swapped: list[tuple[str, nn.Module]] = []
    for path, module in model.named_modules():
        replacement = _replacement(module, Router)
        if replacement is not None:
            swapped.append((path, replacement))
    inside = tuple(f"{path}." for path, _ in swapped)
    whole = {path for path, _ in swapped}
    for path, module in model.named_modules():
        if path not in whole and not path.startswith(inside):
            _widen(module)
    for _, module in model.named_modules():
        if isinstance(module, Attention):
            module.attend = attention
    for path, module in swapped:
        _put(model, path, module)
    for layer in model.layers:
        adopt(layer)
    return model


def _replacement(module: nn.Module, router: type) -> nn.Module | None:
    if isinstance(module, router):
        return KernelRouter(module)
    if isinstance(module, (nn.Linear, nn.QuantizedLinear)) and has_kernel(module):
        return KernelLinear(module)
    if isinstance(module, nn.RMSNorm):
        return KernelRMSNorm(module)
    if isinstance(module, SwitchGLU) and all(has_kernel(module[f"{name}_proj"]) for name in ("gate", "up", "down")):
        return KernelSwitchGLU(module)
    if isinstance(module, (nn.Embedding, nn.QuantizedEmbedding)) and has_kernel(module):
        return KernelEmbedding(module)
    return None


def _widen(module: nn.Module) -> None:
    """The module's own 16-bit parameters become float32."""
    for name, value in list(module.items()):
        if isinstance(value, mx.array) and value.dtype in (mx.bfloat16, mx.float16):
            module[name] = value.astype(mx.float32)


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    *parents, name = path.split(".")
    for part in parents:
        model = model[int(part)] if isinstance(model, list) else getattr(model, part)
    setattr(model, name, module)
