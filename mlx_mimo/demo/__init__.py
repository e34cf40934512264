"""The embedded demo model: a checkpoint in the released format, and its held-out questions."""

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "checkpoint"
