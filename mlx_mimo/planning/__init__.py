"""Plans: whether a model fits on a machine and how fast it is. MLX is imported only for a GPU's limits."""
