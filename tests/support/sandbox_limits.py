"""Limits of small programs in the sandbox."""

from megatron_dsrl.rewards.sandbox import Limits

LIMITS = Limits(wall_seconds=20, cpu_seconds=5, memory_bytes=2**29, folder_bytes=2**20, folder_files=100, threads=4)
