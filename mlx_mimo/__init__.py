"""mlx-mimo: MiMo-V2-Flash for MLX, with experts that need not all be in memory.

Importing this package loads nothing heavy: `load` and `stream_generate` are fetched on first use.
"""

from pathlib import Path as _Path

__version__ = "0.1.0"
__all__ = ["__version__", "load", "stream_generate"]

# In a checkout the converter lies beside this folder, not in it; an installed package has it within.
if not (_Path(__file__).parent / "convert").exists() and (_Path(__file__).parents[1] / "convert").exists():
    __path__.append(str(_Path(__file__).parents[1]))


def __getattr__(name: str):
    if name == "load":
        from .runtime.load import load

        return load
    if name == "stream_generate":
        from .runtime.stream import stream_generate

        return stream_generate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
