"""The converter: makes a directory that MLX loads from a Hugging Face FP8 checkpoint."""

__all__ = ["convert_checkpoint"]


def __getattr__(name: str):
    if name == "convert_checkpoint":
        from .convert import convert_checkpoint

        return convert_checkpoint
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
