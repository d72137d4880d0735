"""What SGLang lacks on a machine without CUDA; loaded in engine processes only."""
