"""`mlx_mimo bridge`: unmodified mlx-lm commands run our model and residency on a directory."""
