"""What `tools.first_gpu_run` and `tools.gpu_probe` share: commands with time limits, figures, and the record."""
