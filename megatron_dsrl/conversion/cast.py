"""Cast weights to the dtype of a conversion, and report values that are lost or were lost before."""

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_dsrl.common.waiting import say_on_first_rank
from megatron_dsrl.weights.hf_checkpoint import torch_dtype_name

NAMES_SHOWN = 3


class Cast:
    """Casts tensors and counts values that are not finite."""

    def __init__(self, dtype: torch.dtype | None) -> None:
        """None leaves tensors as they are."""
        self._dtype = dtype
        self.overflows: Counter[str] = Counter()
        """Values beyond the dtype's range, by tensor name: they became infinite."""
        self.not_finite: Counter[str] = Counter()
        """NaN and infinite values of the source, by tensor name."""

    def __call__(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor in the dtype."""
        converted = tensor.to(self._dtype or tensor.dtype)
        # The extremes show NaN and infinity, and are many times faster than looking at every value or a float32 sum.
        if converted.numel() and not torch.stack(converted.aminmax()).isfinite().all():
            before = int(tensor.isfinite().logical_not().sum())
            after = int(converted.isfinite().logical_not().sum())
            self.not_finite += Counter({name: before})
            self.overflows += Counter({name: after - before})
        return converted


def overflow_message(casts: Sequence[Cast], dtype: torch.dtype | None) -> str | None:
    """Which values are lost in a dtype, over all processes; None if none are."""
    counts = sum((cast.overflows for cast in casts), Counter[str]())
    if not counts or dtype is None:
        return None
    return (
        f"{_shown(counts)} beyond the range of {torch_dtype_name(dtype)} (largest number {torch.finfo(dtype).max:.6g}) "
        "became infinite; choose another --dtype"
    )


def not_finite_message(casts: Sequence[Cast]) -> str | None:
    """Where the source is not finite, over all processes; None if it is."""
    counts = sum((cast.not_finite for cast in casts), Counter[str]())
    return f"the source has NaN or infinite values: {_shown(counts)}" if counts else None


def warn(casts: Sequence[Cast], dtype: torch.dtype) -> None:
    """Print both messages, on one process."""
    for message in (overflow_message(casts, dtype), not_finite_message(casts)):
        if message is not None:
            say_on_first_rank(f"warning: {message}")


def _shown(counts: Counter[str]) -> str:
    names = ", ".join(f"{count} in {name}" for name, count in counts.most_common(NAMES_SHOWN))
    more = f", and {len(counts) - NAMES_SHOWN} more tensors" if len(counts) > NAMES_SHOWN else ""
    return f"{counts.total()} value{'s' if counts.total() > 1 else ''} ({names}{more})"
