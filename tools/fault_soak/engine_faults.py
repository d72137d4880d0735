"""Engines that die, hang or crawl. They are restarted with their weights, and the step continues.

An engine that dies while the command starts ends it with a message instead: it may be that no engine can start here.
"""

from tools.fault_soak.fault import IN_A_STEP, USER_ERROR, Moment, register
from tools.fault_soak.process_faults import Kill, Starve, Stop
from tools.fault_soak.processes import detokenizers, engines, schedulers


@register("kill_engine")
class KillEngine(Kill):
    """The server; its other processes are removed with it."""

    role = staticmethod(engines)


@register("kill_starting_engine")
class KillStartingEngine(Kill):
    """Before it has answered once, which the command does not retry."""

    role = staticmethod(engines)
    moments = (Moment.START,)
    statuses = frozenset({USER_ERROR})


@register("kill_scheduler")
class KillScheduler(Kill):
    """The process that holds the model; its server ends itself."""

    role = staticmethod(schedulers)


@register("kill_detokenizer")
class KillDetokenizer(Kill):
    """The process that turns tokens into text; its server ends itself."""

    role = staticmethod(detokenizers)


@register("stop_engine")
class StopEngine(Stop):
    """Noticed by health checks while it samples, by `engine.update_timeout_seconds` while it takes weights."""

    role = staticmethod(engines)
    moments = IN_A_STEP


@register("stop_scheduler")
class StopScheduler(Stop):
    """Its server still accepts calls, and answers none."""

    role = staticmethod(schedulers)


@register("stop_detokenizer")
class StopDetokenizer(Stop):
    """Requests are accepted and sampled, but their answers do not come back."""

    role = staticmethod(detokenizers)


@register("starve_engine")
class StarveEngine(Starve):
    """A slow server: late answers, late health checks."""

    role = staticmethod(engines)
    moments = (Moment.GENERATE, Moment.PUSH_WEIGHTS)


@register("starve_scheduler")
class StarveScheduler(Starve):
    """A slow model: late answers, while the server itself is healthy."""

    role = staticmethod(schedulers)
    moments = (Moment.GENERATE, Moment.PUSH_WEIGHTS)
