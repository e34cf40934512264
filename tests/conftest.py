"""Set before MLX or torch start: comparisons to 1e-4 need whole float32, and tests share the machine. MLX_MIMO_DEVICE
is for the tests as it is for the commands."""

import os

# Hardware with matrix units (CUDA, M5 on) multiplies float32 with 10 bits of mantissa unless told not to.
os.environ["MLX_ENABLE_TF32"] = "0"
os.environ.setdefault("OMP_NUM_THREADS", "1")

from mlx_mimo import device

device.choose()
