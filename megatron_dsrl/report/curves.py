"""Which figures of the step records a report draws, and what they mean."""

from dataclasses import dataclass

from megatron_dsrl.charts.chart_source import ValueAxis

PARTS_OF_A_STEP = ("generate", "old_log_probs", "reference", "values", "critic", "train", "push_weights", "evaluate")
"""In their order, as the names of seconds in step records."""
FRACTION = ValueAxis("fraction", at_least=0.0, at_most=1.0)
NAT = ValueAxis("nat per token")


@dataclass(frozen=True)
class Curves:
    """A line chart of step-record keys."""

    title: str
    explanation: str
    keys: tuple[tuple[str, str, int], ...]
    """Series name, step-record key and colour of every curve; the first one is the one that comparisons show."""
    absent: str
    """Said instead of the chart when no step has a value."""
    axis: ValueAxis
    is_of_the_update: bool = False
    """The value depends on the phase's space and coefficient, so that it is not comparable between phases."""


REWARD = Curves(
    "Reward",
    "Mean verifier score of all sampled responses.",
    (("mean reward", "reward/mean", 1),),
    "No rewards were recorded.",
    ValueAxis("mean reward"),
)
HEALTH = (
    Curves(
        "Response length",
        "Tokens per response; if the longest equals the length limit, it was truncated.",
        (("mean tokens", "response/mean_tokens", 1), ("longest", "response/max_tokens", 5)),
        "No response lengths were recorded.",
        ValueAxis("tokens"),
    ),
    Curves(
        "Truncated responses",
        "Fraction of responses that were cut at the length limit.",
        (("fraction", "response/truncated_fraction", 2),),
        "No truncation was recorded.",
        FRACTION,
    ),
    Curves(
        "Entropy of P(y|x)",
        "Of the policy given the prompt, P(y|x), per token (nat). Sampled: estimated from the log-probs of all sampled "
        "tokens. Trained: exact, over the tokens trained on in the post-train space.",
        (("sampled", "response/conditional_entropy", 4), ("trained", "policy/entropy", 5)),
        "No entropy was recorded.",
        NAT,
    ),
    Curves(
        "Entropy of P(y)",
        "Without the prompt, as the pre-train space updates it: per trained token (nat).",
        (("entropy", "pre_train/entropy", 4),),
        "No step was in the pre-train space.",
        NAT,
    ),
    Curves(
        "Log-prob gap to the engine",
        "|trainer − engine| per token (nat). Both score the same weights, so it should stay near zero.",
        (("mean gap", "mismatch/mean_log_prob_gap", 2), ("largest", "mismatch/max_log_prob_gap", 5)),
        "No step was in the post-train space, where trainer and engine score the same sequence.",
        ValueAxis("nat per token", is_log=True),
    ),
    Curves(
        "Tokens with a ratio outside 0.5 to 2",
        "Fraction of tokens whose probability by the trainer is less than half or more than twice the engine's.",
        (("fraction", "mismatch/ratio_tail_fraction", 5),),
        "No step was in the post-train space, where trainer and engine score the same sequence.",
        FRACTION,
    ),
    Curves(
        "Log-prob gap to the prompt",
        "|log P(y) − log P(y|x)| per token (nat): how much the prompt matters to the response.",
        (("mean gap", "pre_train/mean_log_prob_gap", 4),),
        "No step was in the pre-train space.",
        NAT,
    ),
    Curves(
        "Loss",
        "Of the update, coefficient included: not comparable between phases, so the curve begins again.",
        (("loss", "policy/loss", 1),),
        "No loss was recorded.",
        ValueAxis("loss"),
        is_of_the_update=True,
    ),
    Curves(
        "Gradient norm",
        "Global norm of the update before clipping, coefficient included: the curve begins again with a phase.",
        (("gradient norm", "policy/grad_norm", 3),),
        "No gradient norm was recorded.",
        ValueAxis("norm"),
        is_of_the_update=True,
    ),
    Curves(
        "Trained samples",
        "Samples that the phase's filter kept for the update.",
        (("kept samples", "policy/kept_samples", 3),),
        "No sample counts were recorded.",
        ValueAxis("samples"),
    ),
)
COST = (
    Curves(
        "Tokens per second",
        "Response tokens generated per second of generation.",
        (("tokens per second", "throughput/tokens_per_second", 3),),
        "No throughput was recorded.",
        ValueAxis("tokens per second"),
    ),
)
PROMPTS = ValueAxis("prompts")
GROUP_KEYS = (
    ("solved", "reward/solved_groups", 3),
    ("mixed", "reward/mixed_groups", 1),
    ("unsolved", "reward/unsolved_groups", 2),
)
MIXED_GROUPS = Curves(
    "Mixed groups",
    "Prompts with right and wrong responses in the same step: the ones that group advantages learn from.",
    (("mixed", "reward/mixed_groups", 1),),
    "No groups were recorded.",
    PROMPTS,
)
STEP_SECONDS = Curves(
    "Seconds per step",
    "Wall time.",
    (("seconds", "seconds/step", 1),),
    "No times were recorded.",
    ValueAxis("seconds"),
)
SPACES = {
    "post_train": ("log P(y|x)", 1),
    "pre_train": ("log P(y)", 2),
    "post_train+pre_train": ("log P(y|x) and log P(y)", 4),
}
"""Label and curve colour of a phase, by the `space` of its step records."""
OF_THE_UPDATE = ("loss", "total_loss", "grad_norm")
"""Last parts of keys whose values are comparable within a phase only."""
