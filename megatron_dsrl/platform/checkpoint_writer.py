"""Megatron's checkpoint writer without a process of its own.

Megatron collects the results of its writers in a queue that another process holds, a multiprocessing manager, so that
writing could go on in the background. That process outlives a killed trainer. Here checkpoints are written by threads
of the trainer, for which a queue in memory is enough; it also saves the seconds in which the process would start.
"""

import queue


def keep_results_in_memory() -> None:
    """Give Megatron a queue in memory, in place of the one that it would make at the first save. Before every save."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    if filesystem_async._results_queue is None:
        filesystem_async._results_queue = queue.Queue()
