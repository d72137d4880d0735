"""The trainer's processes: killed, stopped, asked to stop. The same command continues from the newest checkpoint."""

import signal

from tools.fault_soak.fault import (
    FAILED,
    HUNG_UP,
    IN_A_STEP,
    INTERRUPTED,
    KILLED,
    PREEMPTED,
    TERMINATED,
    Moment,
    register,
)
from tools.fault_soak.process_faults import Kill, Pause, SendSignal, Starve, Stop
from tools.fault_soak.processes import launcher, ranks
from tools.fault_soak.training import Training

ANY_TIME = (Moment.START, *IN_A_STEP)


@register("kill_rank")
class KillRank(Kill):
    """Another rank may fail first, in the collective that the killed one has left."""

    role = staticmethod(ranks)
    moments = ANY_TIME
    statuses = frozenset({KILLED, FAILED})
    must_end = True


@register("kill_launcher")
class KillLauncher(Kill):
    """The launcher's death ends the ranks with it."""

    role = staticmethod(launcher)
    moments = ANY_TIME
    statuses = frozenset({KILLED})
    must_end = True


@register("kill_checkpoint_writer")
class KillCheckpointWriter(Kill):
    """The writer is a thread of every rank: one of the ranks is killed while there is an incomplete checkpoint."""

    role = staticmethod(ranks)
    moments = (Moment.SAVE,)
    statuses = frozenset({KILLED, FAILED})
    must_end = True

    def apply(self, training: Training) -> str | None:
        return super().apply(training) if training.partial_checkpoints() else None


@register("stop_rank")
class StopRank(Stop):
    """Ends the run after `parallel.collective_timeout_seconds`, in the collective that waits for it."""

    role = staticmethod(ranks)
    statuses = frozenset({FAILED, KILLED})
    must_end = True
    takes_minutes = True


@register("pause_rank")
class PauseRank(Pause):
    """The other ranks wait for it in their next collective."""

    role = staticmethod(ranks)


@register("starve_rank")
class StarveRank(Starve):
    """A slow rank slows down all of them and changes nothing else."""

    role = staticmethod(ranks)


@register("terminate")
class Terminate(SendSignal):
    """SIGTERM, as SLURM sends it; 143 before there is anything to save."""

    role = staticmethod(launcher)
    moments = ANY_TIME
    statuses = frozenset({PREEMPTED, TERMINATED})
    must_end = True
    number = signal.SIGTERM


@register("hang_up")
class HangUp(SendSignal):
    """SIGHUP, as from a terminal that is closed."""

    role = staticmethod(launcher)
    moments = ANY_TIME
    statuses = frozenset({PREEMPTED, HUNG_UP})
    must_end = True
    number = signal.SIGHUP


@register("terminate_one_rank")
class TerminateOneRank(SendSignal):
    """SIGUSR1 to any rank stops them all."""

    role = staticmethod(ranks)
    statuses = frozenset({PREEMPTED})
    must_end = True
    number = signal.SIGUSR1


@register("interrupt")
class Interrupt(SendSignal):
    """Ctrl-C."""

    role = staticmethod(launcher)
    statuses = frozenset({INTERRUPTED})
    must_end = True
    number = signal.SIGINT
