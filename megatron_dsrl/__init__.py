"""megatron-dsrl: reinforcement learning in pre-train space at Megatron scale."""

__version__ = "0.1.0"
