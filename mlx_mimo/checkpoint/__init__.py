"""The files on disk: what a model directory holds, how its bytes are laid out, what is wrong with it. No MLX."""
