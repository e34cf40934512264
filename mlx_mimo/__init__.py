"""mlx-mimo: MiMo-V2-Flash for MLX, with experts that need not all be in memory.

Importing this package loads nothing heavy: `load` and `stream_generate` are fetched on first use.
"""

__version__ = "0.1.0"
__all__ = ["__version__", "load", "stream_generate"]


def __getattr__(name: str):
    if name == "load":
        from .runtime.load import load

        return load
    if name == "stream_generate":
        from .runtime.stream import stream_generate

        return stream_generate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
