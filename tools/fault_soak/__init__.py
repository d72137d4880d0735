"""A short training, disturbed at random moments, must end as an undisturbed one: `python -m tools.fault_soak`."""
