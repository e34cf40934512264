"""A process that runs a model takes the memory of its budget, whatever the checkpoint's size."""

import subprocess
import sys
from pathlib import Path

import pytest

MEMORY_CHECK = Path(__file__).parents[2] / "examples" / "measure" / "memory_check.py"


@pytest.mark.long
def test_peak_memory_of_a_generation_is_the_budgets():
    arguments = ["--size", "500MB", "--expert-memory", "25MB", "--prompt-tokens", "512", "--generation-tokens", "8"]
    result = subprocess.run([sys.executable, MEMORY_CHECK, *arguments], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "at most" in result.stdout
