"""The first run on a machine with GPUs: stages from the environment check to Qwen3-8B on eight GPUs."""
