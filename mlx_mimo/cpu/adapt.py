"""Prepares a loaded model for the CPU: puts modules with kernels in the place of MLX's.

numba is optional: modules that need it are imported inside the functions that use them.
"""

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map
from mlx_lm.models.switch_layers import SwitchGLU

from ..models.mimo_v2_flash import Attention, Router
from ..planning import backend
from . import note_if_missing


def adapt(model: nn.Module, kernels: bool = True) -> None:
    """Prepares a loaded model for the CPU, in place: modules with kernels where there are any, float32 elsewhere.

    Without kernels every parameter becomes float32: MLX's CPU backend accumulates in the activations' type, and is slow
    in 16 bits.
    """
    if kernels and backend.kernels_available():
        use_cpu_kernels(model)
        return
    note_if_missing()
    narrow = (mx.bfloat16, mx.float16)
    model.update(tree_map(lambda x: x.astype(mx.float32) if x.dtype in narrow else x, model.parameters()))


def use_cpu_kernels(model: nn.Module) -> nn.Module:
    """Replaces the modules of `model` that have kernels, in place; the others' 16-bit parameters become float32.

    Returns `model`. Quantised weights and their scales keep their types. Formats without kernels keep MLX's modules.
    """
    from .attention import attention
    from .decode import adopt

    swapped: list[tuple[str, nn.Module]] = []
    for path, module in model.named_modules():
        replacement = _replacement(module)
        if replacement is not None:
            swapped.append((path, replacement))
    inside = tuple(f"{path}." for path, _ in swapped)
    replaced = {path for path, _ in swapped}
    for path, module in model.named_modules():
        if path not in replaced and not path.startswith(inside):
            _widen(module)
    for _, module in model.named_modules():
        if isinstance(module, Attention):
            module.attend = attention
    for path, module in swapped:
        _put(model, path, module)
    for layer in model.layers:
        adopt(layer)
    return model


def _replacement(module: nn.Module) -> nn.Module | None:
    from . import modules

    if isinstance(module, Router):
        return modules.KernelRouter(module)
    if isinstance(module, (nn.Linear, nn.QuantizedLinear)) and modules.has_kernel(module):
        return modules.KernelLinear(module)
    if isinstance(module, nn.RMSNorm):
        return modules.KernelRMSNorm(module)
    if isinstance(module, SwitchGLU) and all(
        modules.has_kernel(module[f"{name}_proj"]) for name in ("gate", "up", "down")
    ):
        return modules.KernelSwitchGLU(module)
    if isinstance(module, (nn.Embedding, nn.QuantizedEmbedding)) and modules.has_kernel(module):
        return modules.KernelEmbedding(module)
    return None


def _widen(module: nn.Module) -> None:
    """Makes the module's own 16-bit parameters float32."""
    for name, value in list(module.items()):
        if isinstance(value, mx.array) and value.dtype in (mx.bfloat16, mx.float16):
            module[name] = value.astype(mx.float32)


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    *parents, name = path.split(".")
    for part in parents:
        model = model[int(part)] if isinstance(model, list) else getattr(model, part)
    setattr(model, name, module)
