"""Replacements for parts of SGLang that need CUDA; loaded in engine processes only."""
