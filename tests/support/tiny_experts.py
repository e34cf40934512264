"""Tiny expert files and models: random experts, in files as convert writes them."""

import json
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchGLU

from mlx_mimo.checkpoint.record import ALIGNMENT, TENSOR_ORDER, expert_file_name, expert_tensor_name

HIDDEN, INNER, EXPERTS, TOP_K = 64, 32, 16, 4
NAMES = {mx.uint32: "U32", mx.uint8: "U8", mx.bfloat16: "BF16", mx.float16: "F16", mx.float32: "F32"}


def random_experts(form: str = "affine4", seed: int = 0, experts: int = EXPERTS, hidden=HIDDEN, inner=INNER) -> dict:
    """{tensor of TENSOR_ORDER: (experts, ...)}; form is affineN, mxfp4, bf16, f16 or f32. Scales are bf16."""
    key = mx.random.key(seed)
    tensors = {}
    for name in ("gate_proj", "up_proj", "down_proj"):
        key, sub = mx.random.split(key)
        shape = (experts, hidden, inner) if name == "down_proj" else (experts, inner, hidden)
        weight = mx.random.normal(shape, key=sub) * shape[-1] ** -0.5
        if form in ("bf16", "f16", "f32"):
            kind = {"bf16": mx.bfloat16, "f16": mx.float16, "f32": mx.float32}[form]
            tensors[f"{name}.weight"] = weight.astype(kind)
        elif form == "mxfp4":
            tensors[f"{name}.weight"], tensors[f"{name}.scales"] = mx.quantize(weight, 32, 4, mode="mxfp4")
        else:
            w, scales, biases = mx.quantize(weight, 32, int(form.removeprefix("affine")))
            tensors[f"{name}.weight"] = w
            tensors[f"{name}.scales"], tensors[f"{name}.biases"] = (
                scales.astype(mx.bfloat16),
                biases.astype(mx.bfloat16),
            )
    mx.eval(tensors)
    return tensors


def write_expert_file(directory: Path, layer: int, tensors: dict) -> Path:
    """model-experts-L.safetensors, expert after expert."""
    header, blobs, offset = {}, [], 0
    for expert in range(next(iter(tensors.values())).shape[0]):
        for name in TENSOR_ORDER:
            if name in tensors:
                value = tensors[name][expert]
                blob = np.asarray(mx.contiguous(value).reshape(-1).view(mx.uint8)).tobytes()
                header[expert_tensor_name(layer, expert, name)] = {
                    "dtype": NAMES[value.dtype],
                    "shape": list(value.shape),
                    "data_offsets": [offset, offset + len(blob)],
                }
                blobs.append(blob)
                offset += len(blob)
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    path = Path(directory) / expert_file_name(layer)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(blobs))
    return path


def reference_glu(tensors: dict) -> SwitchGLU:
    """mlx-lm's own layer with the same experts, scales and 16-bit weights as float32."""
    experts, inner, _ = tensors["gate_proj.weight"].shape
    hidden = tensors["down_proj.weight"].shape[1]
    glu = SwitchGLU(hidden, inner, experts)
    for name in ("gate_proj", "up_proj", "down_proj"):
        weight, scales = tensors[f"{name}.weight"], tensors.get(f"{name}.scales")
        if scales is None:
            getattr(glu, name).weight = weight.astype(mx.float32)
            continue
        width = inner if name == "down_proj" else hidden
        mode = "affine" if f"{name}.biases" in tensors else "mxfp4"
        linear = QuantizedSwitchLinear(
            width, weight.shape[1], experts, False, width // scales.shape[-1], weight.shape[-1] * 32 // width, mode
        )
        linear.weight = weight
        linear.scales = scales if mode == "mxfp4" else scales.astype(mx.float32)
        if mode == "affine":
            linear.biases = tensors[f"{name}.biases"].astype(mx.float32)
        setattr(glu, name, linear)
    return glu


class Router(nn.Module):
    """Chooses the top experts of a random projection."""

    def __init__(self, hidden: int, experts: int, top_k: int, seed: int):
        super().__init__()
        self.weight = mx.random.normal((experts, hidden), key=mx.random.key(1000 + seed))
        self.top_k = top_k

    def __call__(self, x):
        logits = x @ self.weight.T
        indices = mx.argpartition(-logits, kth=self.top_k - 1, axis=-1)[..., : self.top_k]
        return indices, mx.softmax(mx.take_along_axis(logits, indices, axis=-1), axis=-1)


class MoE(nn.Module):
    def __init__(self, tensors: dict, top_k: int, seed: int):
        super().__init__()
        experts = tensors["gate_proj.weight"].shape[0]
        self.gate = Router(tensors["down_proj.weight"].shape[1], experts, top_k, seed)
        self.switch_mlp = reference_glu(tensors)

    def __call__(self, x):
        indices, weights = self.gate(x)
        return (self.switch_mlp(x, indices) * weights[..., None]).sum(axis=-2)


class Dense(nn.Module):
    def __call__(self, x):
        return mx.tanh(x)


class Layer(nn.Module):
    def __init__(self, mlp):
        super().__init__()
        self.mlp = mlp

    def __call__(self, x):
        return x + self.mlp(mx.fast.rms_norm(x, None, 1e-5))


class Model(nn.Module):
    """The shape of a model that `attach` takes: layer 0 dense, then MoE layers, each token on its own."""

    def __init__(self, experts: dict[int, dict], top_k: int = TOP_K):
        super().__init__()
        hidden = next(iter(experts.values()))["down_proj.weight"].shape[1]
        self.args = SimpleNamespace(hidden_size=hidden, num_experts_per_tok=top_k)
        self.model = nn.Module()
        self.model.layers = [
            Layer(MoE(experts[i], top_k, i) if i in experts else Dense()) for i in range(max(experts) + 1)
        ]

    def __call__(self, x):
        for layer in self.model.layers:
            x = layer(x)
        return x


def tiny_model(directory: Path, layers: int = 3, form: str = "affine4", **sizes) -> Model:
    """A model, whose expert files are written to `directory`."""
    forms = form if isinstance(form, dict) else dict.fromkeys(range(1, layers + 1), form)
    experts = {layer: random_experts(kind, seed=layer, **sizes) for layer, kind in forms.items()}
    for layer, tensors in experts.items():
        write_expert_file(directory, layer, tensors)
    return Model(experts)
