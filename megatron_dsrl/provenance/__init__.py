"""Provenance of a run: code, packages, machine, model and data, one record per start."""
