"""The converter: a Hugging Face FP8 checkpoint in, an MLX directory out."""

__all__ = ["convert_checkpoint"]


def __getattr__(name: str):
    if name == "convert_checkpoint":
        from .convert import convert_checkpoint

        return convert_checkpoint
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
