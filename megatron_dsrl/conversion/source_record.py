"""What a conversion records of its source and of itself, found out while weights are written."""

from concurrent.futures import Future
from pathlib import Path
from typing import Any

from megatron_dsrl.common.collective import rank
from megatron_dsrl.common.process import in_background
from megatron_dsrl.provenance.inputs import describe_model
from megatron_dsrl.provenance.start import find_out


def describe_in_background(source: str, folder: Path) -> Future[dict[str, Any]]:
    """Start to find out the details of the provenance record, for `record_found`. Nothing on other ranks than 0.

    Args:
        source: as the command line names it.
        folder: its folder.
    """
    return in_background(lambda: find_out({"source": lambda: describe_model(source, folder)}) if rank() == 0 else {})
