"""Measurements for a machine with one GPU that has PyTorch, but perhaps neither SGLang nor Transformer Engine."""
