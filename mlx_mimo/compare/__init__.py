"""`mlx_mimo compare`: how far two directories' predictions are apart."""
