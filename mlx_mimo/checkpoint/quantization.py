"""How one matrix is stored, in MLX's words: bits, group size and mode."""

from dataclasses import dataclass

from ..errors import UsageError

AFFINE_BITS = (2, 3, 4, 5, 6, 8)
AFFINE_GROUPS = (32, 64, 128)


@dataclass(frozen=True)
class Quantization:
    """How a matrix is stored, as `mx.quantize` takes it."""

    bits: int
    group_size: int
    mode: str = "affine"

    def as_json(self) -> dict[str, int | str]:
        """The fields that config.json has for it."""
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}

    @property
    def bits_per_weight(self) -> float:
        """Scales and biases included."""
        return self.bits + (32 if self.mode == "affine" else 8) / self.group_size

    def __str__(self) -> str:
        return self.mode if self.mode != "affine" else f"{self.bits}-bit group {self.group_size}"


def checked_quantization(
    bits: int | None, group_size: int | None = None, mode: str = "affine", where: str = ""
) -> Quantization:
    """A Quantization that `mx.quantize` and the converter know. Raises UsageError, which begins with `where`."""
    if mode == "mxfp4":
        if bits not in (4, None) or group_size not in (32, None):
            raise UsageError(f"{where}mxfp4 has 4 bits and groups of 32")
        return Quantization(4, 32, mode)
    if mode != "affine":
        raise UsageError(f"{where}mode {mode!r}: affine or mxfp4 expected")
    group_size = 64 if group_size is None else group_size
    if bits is None or bits not in AFFINE_BITS:
        raise UsageError(f"{where}{bits!r} bits: one of {', '.join(map(str, AFFINE_BITS))} expected")
    if group_size not in AFFINE_GROUPS:
        raise UsageError(f"{where}group size {group_size!r}: one of {', '.join(map(str, AFFINE_GROUPS))} expected")
    return Quantization(bits, group_size, mode)
