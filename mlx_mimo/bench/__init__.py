"""`mlx_mimo bench`: times prefill and decode, also beside mlx-lm."""
