"""Converted tiny directories, made once a test run and shared."""

from functools import cache
from pathlib import Path
from tempfile import mkdtemp

from checkpoints import tiny_config, write_checkpoint

from mlx_mimo.convert import convert_checkpoint

DEMO_CHECKPOINT = Path(__file__).parents[1] / "mlx_mimo" / "demo" / "checkpoint"


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
