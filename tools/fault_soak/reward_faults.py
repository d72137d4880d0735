"""Reward workers and their fork server. Whatever a signal killed is replaced, and its response is judged once more.

A worker is never stopped for good: after `reward.timeout_seconds` its response scores 0, as that of a verifier that
hangs. That is as documented, and another result than the undisturbed run's.
"""

from tools.fault_soak.fault import Moment, register
from tools.fault_soak.process_faults import Kill, Pause, Starve
from tools.fault_soak.processes import reward_fork_servers, reward_workers


@register("kill_reward_worker")
class KillRewardWorker(Kill):
    role = staticmethod(reward_workers)


@register("pause_reward_worker")
class PauseRewardWorker(Pause):
    role = staticmethod(reward_workers)
    moments = (Moment.GENERATE,)


@register("starve_reward_worker")
class StarveRewardWorker(Starve):
    role = staticmethod(reward_workers)
    moments = (Moment.GENERATE,)


@register("kill_reward_fork_server")
class KillRewardForkServer(Kill):
    """Its workers die with it."""

    role = staticmethod(reward_fork_servers)


@register("pause_reward_fork_server")
class PauseRewardForkServer(Pause):
    role = staticmethod(reward_fork_servers)
