"""Reward workers and their fork server. A killed one is replaced, its response is judged once more; the pool continues
stopped workers without help."""

from tools.fault_soak.fault import Moment, register
from tools.fault_soak.process_faults import Kill, Pause, Starve, Stop
from tools.fault_soak.processes import reward_fork_servers, reward_workers


@register("kill_reward_worker")
class KillRewardWorker(Kill):
    """Like the kernel when memory runs out."""

    role = staticmethod(reward_workers)


@register("stop_reward_worker")
class StopRewardWorker(Stop):
    """Its response is counted as a timeout after `reward.timeout_seconds`."""

    role = staticmethod(reward_workers)


@register("starve_reward_worker")
class StarveRewardWorker(Starve):
    """A slow verdict, within or beyond the time limit."""

    role = staticmethod(reward_workers)
    moments = (Moment.GENERATE,)


@register("kill_reward_fork_server")
class KillRewardForkServer(Kill):
    """Its workers die with it."""

    role = staticmethod(reward_fork_servers)


@register("pause_reward_fork_server")
class PauseRewardForkServer(Pause):
    """New workers wait until it continues."""

    role = staticmethod(reward_fork_servers)
