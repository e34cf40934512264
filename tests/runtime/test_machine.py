"""What a process says of its own memory."""

import subprocess
import sys

import numpy as np

from mlx_mimo.runtime.machine import peak_memory_bytes

CHILD = """
from mlx_mimo.runtime.machine import peak_memory_bytes
before = peak_memory_bytes()
memory = bytearray(b"x") * 200_000_000
del memory
print(before, peak_memory_bytes())
"""


def test_the_peak_is_the_processs_own_and_keeps_what_was_freed():
    mine = np.full(400_000_000, 1, np.uint8)  # the child must not begin with this
    assert peak_memory_bytes() >= mine.nbytes
    child = subprocess.run([sys.executable, "-c", CHILD], check=True, capture_output=True, text=True)
    before, after = (int(number) for number in child.stdout.split())
    assert before < 200_000_000
    assert 190_000_000 < after - before < 250_000_000
