"""Checkpoints of random weights with the released model's widths, in the converted format, for timing.

They have fewer layers and fewer experts a layer than the release; each expert and each layer costs as much as there.
With divided widths a small file holds as many experts as the release, so that residency has something to choose from.
"""

import json
from math import prod, sqrt
from pathlib import Path

import numpy as np

from ..config import released
from ..config.model_args import ModelArgs
from ..errors import MimoError, UsageError
from ..planning.budget import Budget, estimate
from ..units import format_size

LAYERS = (6, 12, 24, 48)  # numbers of layers; the first layer is dense, the first and every sixth are global
VOCABULARY = 4096
NARROWED = (
    "hidden_size", "intermediate_size", "moe_intermediate_size", "num_attention_heads", "num_key_value_heads",
    "swa_num_attention_heads", "swa_num_key_value_heads",
)  # fmt: skip
# Spread of the correction bias, which makes some experts more popular: with 256 of them the best eighth takes about two
# thirds of the choices, the best quarter five sixths, as measured on real models (docs/RESIDENCY.md).
ROUTER_BIAS = 0.13


def synthetic_config(nbytes: int, recipe: str, narrow: int = 1) -> dict:
    """The config.json of a model whose trunk and experts take about `nbytes` at a recipe; widths and heads are the
    release's divided by `narrow` (1, 2, 4). Raises UsageError."""
    for layers in LAYERS:
        most = _config(layers, 256, narrow)
        if _weights(most, recipe) >= nbytes or layers == LAYERS[-1]:
            break
    least = _config(layers, 8, narrow)
    if _weights(least, recipe) > nbytes:
        raise UsageError(
            f"--synthetic: at least {format_size(_weights(least, recipe))} expected at the recipe {recipe}"
        )
    one = (_weights(most, recipe) - _weights(least, recipe)) / 248  # bytes of one expert in every layer
    return _config(layers, min(256, 8 + int((nbytes - _weights(least, recipe)) / one)), narrow)


def _config(layers: int, experts: int, narrow: int) -> dict:
    sliding = [0 if layer == 0 or layer % 6 == 5 else 1 for layer in range(layers)]
    narrowed = {name: released.CONFIG[name] // narrow for name in NARROWED}
    return (
        released.CONFIG
        | narrowed
        | {
            "num_hidden_layers": layers,
            "hybrid_layer_pattern": sliding,
            "moe_layer_freq": [0] + [1] * (layers - 1),
            "n_routed_experts": experts,
            "vocab_size": VOCABULARY,
        }
    )


def _weights(config: dict, recipe: str) -> int:
    from ..checkpoint.recipe import named

    budget: Budget = estimate(config, named(recipe), ModelArgs.from_dict(config), 1, 1, 2, 2)
    return budget.trunk + budget.experts


def parameters(config: dict) -> int:
    """The number of parameters of the trunk and all experts."""
    from ..checkpoint import shapes

    wanted = shapes.trunk_shapes(config)
    for layer in shapes.moe_layers(config):
        wanted += shapes.expert_shapes(config, layer)
    return sum(prod(shape.shape) for shape in wanted)


def write_synthetic(directory: Path, config: dict, recipe: str, seed: int = 0) -> None:
    """Writes a converted directory of random weights. Raises MimoError where the disk is full."""
    from ..checkpoint import shapes
    from ..checkpoint.index import INDEX
    from ..checkpoint.layout import layout_of
    from ..checkpoint.recipe import named
    from ..convert import manifest

    wanted = shapes.trunk_shapes(config)
    for layer in shapes.moe_layers(config):
        wanted += shapes.expert_shapes(config, layer)
    layout = layout_of(config, [shape.name for shape in wanted], named(recipe))
    generator = np.random.default_rng(seed)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for output in layout.files:
            with open(directory / output.name, "wb") as file:
                file.write(output.header)
                for item in output.items:
                    for data in _random(item, generator):
                        file.write(data)
        (directory / INDEX).write_bytes(manifest.dump(manifest.index_json(layout)))
        _write_tokenizer(directory, config["vocab_size"])
        (directory / "config.json").write_bytes(manifest.dump(manifest.config_json(layout)))
    except OSError as error:
        raise MimoError(
            f"{directory}: cannot be written: {error.strerror or error}; make room and try again"
        ) from error


def _random(item, generator: np.random.Generator) -> list[bytes]:
    """The bytes of each stored tensor of one weight, scaled so that activations stay near 1."""
    shape, kind = item.source.shape, item.source.kind
    if item.quantization is None:
        if len(shape) == 1 and kind in ("norm", "mtp.norm"):
            values = np.ones(shape, np.float32)
        elif len(shape) == 1:
            values = generator.standard_normal(shape, np.float32) * ROUTER_BIAS
        else:
            values = generator.standard_normal(shape, np.float32) / sqrt(shape[-1])
        return [_stored(values, item.stored[0].dtype)]
    chosen = item.quantization
    codes = generator.integers(0, 2**32, size=item.stored[0].shape, dtype=np.uint32).tobytes()
    if chosen.mode == "mxfp4":  # codes of e2m1 are about 2.8 in size
        exponent = 127 + round(np.log2(1 / (2.8 * sqrt(shape[-1]))))
        return [codes, np.full(item.stored[1].shape, exponent, np.uint8).tobytes()]
    scale = sqrt(12 / shape[-1]) / 2**chosen.bits  # codes are uniform
    scales = np.full(item.stored[1].shape, scale, np.float32)
    return [codes, _stored(scales, "BF16"), _stored(scales * (-(2**chosen.bits - 1) / 2), "BF16")]


def _stored(values: np.ndarray, dtype: str) -> bytes:
    values = np.ascontiguousarray(values, np.float32)
    if dtype == "F32":
        return values.tobytes()
    return (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()


def _write_tokenizer(directory: Path, vocabulary: int) -> None:
    """Something that loads: a word for each token id."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({f"t{i}": i for i in range(vocabulary)}, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(directory / "tokenizer.json"))
    fields = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "t1", "pad_token": "t1", "unk_token": "t0"}
    (directory / "tokenizer_config.json").write_text(json.dumps(fields))
