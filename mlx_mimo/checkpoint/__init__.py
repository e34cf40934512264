"""The files on disk: what a converted directory holds, and how its bytes are laid out. No MLX."""
