"""Converted tiny directories, made once a test run and shared."""

from functools import cache
from pathlib import Path
from tempfile import mkdtemp

from mlx_mimo.convert import convert_checkpoint
from support.checkpoints import tiny_config, write_checkpoint

DEMO_CHECKPOINT = Path(__file__).parents[2] / "mlx_mimo" / "demo" / "checkpoint"


@cache
def _root() -> Path:
    import atexit
    import shutil

    root = Path(mkdtemp(prefix="mlx-mimo-tests-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    return root


@cache
def fp8_directory(seed: int = 0) -> Path:
    """A tiny FP8 checkpoint in the released format. Read only: copy it before you damage it."""
    path = _root() / f"fp8-{seed}"
    write_checkpoint(path, tiny_config(), seed)
    return path


@cache
def converted_directory(recipe: str = "4bit", seed: int = 0) -> Path:
    """`fp8_directory` converted. Read only: copy it before you damage it."""
    path = _root() / f"{recipe}-{seed}"
    convert_checkpoint(fp8_directory(seed), path, recipe=recipe, progress=False)
    return path


@cache
def demo_directory(recipe: str = "4bit") -> Path:
    """The embedded demo checkpoint converted. Read only: copy it before you damage it."""
    path = _root() / f"demo-{recipe}"
    convert_checkpoint(DEMO_CHECKPOINT, path, recipe=recipe, progress=False)
    return path


def stacked_directory(path: Path) -> Path:
    """`converted_directory` as mlx-lm lays it out: an expert cannot be read alone. Written into an empty `path`."""
    import shutil

    import mlx.core as mx

    source = converted_directory()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, path)
    weights = {}
    for file in source.glob("model-trunk-*.safetensors"):
        weights |= mx.load(str(file))
    for layer, file in enumerate(sorted(source.glob("model-experts-*.safetensors")), 1):
        experts = mx.load(str(file))
        tensors = {name.split(".experts.")[1].partition(".")[2] for name in experts}
        for tensor in tensors:
            rows = [
                experts[f"model.layers.{layer}.mlp.experts.{e}.{tensor}"] for e in range(len(experts) // len(tensors))
            ]
            weights[f"model.layers.{layer}.mlp.switch_mlp.{tensor}"] = mx.stack(rows)
    mx.save_safetensors(str(path / "model.safetensors"), weights, metadata={"format": "mlx"})
    return path
