"""The paper's results (arXiv 2604.14142), for comparison with your own.

Averages of Avg@32 over the six mathematics benchmarks, in percent, as published. For single benchmarks only differences
were published.
"""

SIX_BENCHMARKS = {
    "math500": "MATH500",
    "amc23": "AMC23",
    "aime24": "AIME24",
    "aime25": "AIME25",
    "minerva": "Minerva",
    "olympiadbench": "OlympiadBench",
}
"""Titles by name, in the order of the paper's table."""

SAMPLES_ON_SIX = 32

OUT_OF_DISTRIBUTION = {
    "gpqa_diamond": "GPQA-Diamond",
    "mmlu_pro": "MMLU-Pro",
    "bbh": "BBH",
    "humaneval": "HumanEval",
}

METHODS = ("base", "GRPO", "PPO", "REINFORCE++", "RLOO", "Dr.GRPO", "DAPO", "NSR-RL warm-up", "DSRL")
"""Rows of the paper's table; `base` is the model before training."""

AVERAGE_OF_SIX: dict[str, dict[str, float]] = {
    "Qwen3-4B": {"base": 41.26, "GRPO": 55.79, "NSR-RL warm-up": 54.38, "DSRL": 57.54},
    "Qwen3-8B": {"base": 41.62, "GRPO": 57.00, "DSRL": 58.47},
}

DSRL_OVER_GRPO: dict[str, dict[str, float]] = {
    "Qwen3-4B": {"aime24": 4.69, "aime25": 2.50, "gpqa_diamond": 3.79, "mmlu_pro": 5.37},
    "Qwen3-8B": {"gpqa_diamond": 2.52, "mmlu_pro": 4.32, "humaneval": 2.44},
}
"""Percentage points."""
