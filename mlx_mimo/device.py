"""The device that MLX computes on, where the environment chooses it: MLX_MIMO_DEVICE=cpu or gpu."""

import os

from .errors import UsageError

VARIABLE = "MLX_MIMO_DEVICE"
NO_GPU = f"{VARIABLE}=gpu: MLX finds no GPU here; cpu expected, or the variable unset"


def asked() -> str | None:
    """ "cpu", "gpu", or None where MLX is to choose. Raises UsageError. MLX is not loaded for it."""
    found = os.environ.get(VARIABLE, "")
    if found not in ("", "cpu", "gpu"):
        raise UsageError(f"{VARIABLE}: cpu or gpu expected, {found!r} found")
    return found or None


def choose() -> None:
    """Makes MLX compute where the environment says. To be called before mlx_lm.generate is imported, which keeps the
    device that is the default then. Raises UsageError where there is no such device."""
    device = asked()
    if device is None:
        return
    import mlx.core as mx

    if not mx.is_available(getattr(mx, device)):
        raise UsageError(NO_GPU)
    mx.set_default_device(getattr(mx, device))


def check() -> None:
    """For where mlx-lm was loaded before us. Raises UsageError if it computes elsewhere than the environment says."""
    device = asked()
    if device is None:
        return
    import mlx.core as mx

    found = mx.default_device().type.name
    if found != device:
        raise UsageError(f"{VARIABLE}={device}: mlx-lm's commands choose by themselves, and took {found}; unset it")
