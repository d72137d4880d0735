"""Warnings of Megatron that say nothing new to a user of this program."""

import logging
import warnings

EXPECTED = (
    "Transformer Engine and Apex are not installed",  # both are optional; `dsrl doctor` says what is there
    "Apex is not installed",
    "full scope is deprecated",  # about a default value of Megatron's own configuration
    "The following imports from `dynamic_context.py`",  # Megatron's own import
    "MimoModelConfig is experimental",  # a model class that is imported and not used
    "torch.distributed is disabled, unavailable or uninitialized",  # each rank reads the common part by itself
    "The argument order of load has been changed",  # Megatron's call of torch
    "Please use DTensor instead",  # what Megatron's checkpoints are made of
)


def silence_expected_warnings() -> None:
    """Call once, before Megatron is imported: a part of these warnings is given while it is."""
    for message in EXPECTED:
        warnings.filterwarnings("ignore", message=message)
    # "GPTModel IS DEPRECATED": it is the model class of the Megatron release that this program pins.
    logging.getLogger("megatron.core.models.gpt.gpt_model").setLevel(logging.ERROR)
    # "MCore's async save is deprecated": its synchronous save goes that way; the replacement is another package.
    logging.getLogger("megatron.core.dist_checkpointing").setLevel(logging.ERROR)
