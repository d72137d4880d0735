"""Keep what the libraries say at every import out of a run's output."""

import logging
import warnings


def quiet_libraries() -> None:
    """Silence warnings of Megatron-core and PyTorch that tell a user of this program nothing to act on.

    They are about optional kernels that are absent (`dsrl doctor` tells which, and what to do) and about interfaces
    that will change in later versions (the versions are pinned).
    """
    for module in ("megatron", "torch"):
        warnings.filterwarnings("ignore", module=rf"{module}(\.|$)")
    logging.getLogger("megatron").setLevel(logging.ERROR)
