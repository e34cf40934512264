"""`mlx_mimo doctor`: checks of the machine and of a model directory."""
