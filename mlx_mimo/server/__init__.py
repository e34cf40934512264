"""The HTTP server: mlx-lm's handler and generation thread, with limits, expert residency and honest errors."""
