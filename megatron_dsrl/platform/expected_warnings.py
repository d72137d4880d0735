"""Warnings of Megatron that say nothing new to a user of this program."""

import logging
import warnings

EXPECTED = (
    "Transformer Engine and Apex are not installed",  # both are optional; `dsrl doctor` says what is there
    "Apex is not installed",
    "full scope is deprecated",  # about a default value of Megatron's own configuration
    "The following imports from `dynamic_context.py`",  # Megatron's own import
)


def silence_expected_warnings() -> None:
    """Call once, before Megatron is imported: a part of these warnings is given while it is."""
    for message in EXPECTED:
        warnings.filterwarnings("ignore", message=message)
    # "GPTModel IS DEPRECATED": it is the model class of the Megatron release that this program pins.
    logging.getLogger("megatron.core.models.gpt.gpt_model").setLevel(logging.ERROR)
