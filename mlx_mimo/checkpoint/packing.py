"""How the matrices of an expert record are quantised, read off their shapes."""

from ..errors import FormatError
from .quantization import AFFINE_BITS, AFFINE_GROUPS, Quantization
from .record import PROJECTIONS, RecordLayout, RecordTensor


def quantizations(layout: RecordLayout, hidden_size: int) -> dict[str, Quantization | None]:
    """{projection: its quantization, or None where it is not quantised}, read off the record's shapes.

    Raises FormatError where the shapes fit no quantization, or belong to a model of another size.
    """
    tensors = {tensor.name: tensor for tensor in layout.tensors}
    for projection in PROJECTIONS:
        if f"{projection}.weight" not in tensors:
            raise FormatError(f"expert record without {projection}.weight; convert the checkpoint again")
    inner = tensors["gate_proj.weight"].shape[0]
    found = {}
    for projection in PROJECTIONS:
        width, outputs = (inner, hidden_size) if projection == "down_proj" else (hidden_size, inner)
        weight = tensors[f"{projection}.weight"]
        scales, biases = tensors.get(f"{projection}.scales"), tensors.get(f"{projection}.biases")
        packed = _packing(weight, scales, biases, width) if scales else None
        if len(weight.shape) != 2 or weight.shape[0] != outputs or (not packed and weight.shape[1] != width):
            raise FormatError(
                f"expert record: {projection}.weight is {weight.dtype} {list(weight.shape)}, which does not fit "
                f"{width} inputs and {outputs} outputs; config.json and expert files belong to different models"
            )
        found[projection] = packed
    return found


def _packing(
    weight: RecordTensor, scales: RecordTensor, biases: RecordTensor | None, width: int
) -> Quantization | None:
    columns, groups = weight.shape[-1] * 32, scales.shape[-1]
    if weight.dtype != "U32" or columns % width or width % groups:
        return None
    bits, group_size = columns // width, width // groups
    if biases:
        valid = bits in AFFINE_BITS and group_size in AFFINE_GROUPS
        return Quantization(bits, group_size, "affine") if valid else None
    mode = {(4, 32): "mxfp4", (8, 32): "mxfp8", (4, 16): "nvfp4"}.get((bits, group_size))
    return Quantization(bits, group_size, mode) if mode else None
