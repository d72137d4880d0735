"""Irrelevant warnings of Megatron, to be silenced."""

import logging
import warnings

EXPECTED = (
    "Transformer Engine and Apex are not installed",  # both are optional; `dsrl doctor` reports them
    "Apex is not installed",
    "full scope is deprecated",  # about a default of Megatron's configuration
    "The following imports from `dynamic_context.py`",  # from Megatron's own imports
    "MimoModelConfig is experimental",  # a model class that is imported but not used
    "torch.distributed is disabled, unavailable or uninitialized",  # each rank reads the common part on its own
    "The argument order of load has been changed",  # Megatron's call of torch
    "Please use DTensor instead",  # about the tensor class of Megatron's checkpoints
)


def silence_expected_warnings() -> None:
    """Call it once, before importing Megatron: some of these warnings are issued during the import."""
    for message in EXPECTED:
        warnings.filterwarnings("ignore", message=message)
    # "GPTModel IS DEPRECATED": the model class of the pinned Megatron release.
    logging.getLogger("megatron.core.models.gpt.gpt_model").setLevel(logging.ERROR)
    # "MCore's async save is deprecated": its synchronous save uses it too; the replacement is another package.
    logging.getLogger("megatron.core.dist_checkpointing").setLevel(logging.ERROR)
