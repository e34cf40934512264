"""What fits, and how fast, on which machine. MLX is asked only for a GPU's limits."""
