"""config.json: its checked values, and the file of the released model. No MLX."""
