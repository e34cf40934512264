"""What `mlx_mimo bridge` adds to config.json: the bytes that were converted are the file without it."""

FILE = "mlx_mimo_bridge.py"
# One line of its own, so that taking it out gives back the very bytes.
LINE = f'\n  "model_file": "{FILE}",'


def without(config: bytes) -> bytes:
    """A config.json as it was before the bridge was turned on."""
    return config.replace(LINE.encode(), b"", 1)
