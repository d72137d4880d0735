"""A server that is started again when it is lost, a limited number of times."""

import logging
import time
from dataclasses import dataclass

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.rollout.engines.errors import EngineStartError, LostEngineError
from megatron_dsrl.rollout.engines.server import EngineServer

logger = logging.getLogger(__name__)

LONGEST_PAUSE_SECONDS = 30.0


@dataclass
class SupervisedServer:
    """A server that is started again when it is lost."""

    server: EngineServer
    engine: int
    """Its number, for messages."""
    max_restarts: int
    """How often it is started again before that is an error."""
    restarts: int = 0

    def wait_until_ready(self) -> None:
        """Block until the server answers, starting it again if it was killed, is late or has lost its port.

        Raises:
            UserError: it exited by itself, or its port is in use.
            LostEngineError: it was started too often; with the end of its log.
        """
        try:
            self.server.wait_until_ready()
        except EngineStartError as error:
            self._start_again(str(error), (EngineStartError,))

    def restart(self, problem: str) -> None:
        """Stop the server, which was in use and is lost because of this problem, and start a new one.

        Raises:
            LostEngineError: it was started too often; with the end of its log. Not a UserError: the job may succeed
                when started again, perhaps on another node.
        """
        self._start_again(problem, (EngineStartError, UserError))

    def may_restart(self) -> bool:
        """Whether `engine.max_restarts` allows another start."""
        return self.restarts < self.max_restarts

    def _start_again(self, problem: str, temporary: tuple[type[Exception], ...]) -> None:
        pause = 0.0
        while self.may_restart():
            self.restarts += 1
            count = f"{self.restarts} of engine.max_restarts = {self.max_restarts}"
            logger.warning("restarting engine %d (restart %s): %s", self.engine, count, problem)
            time.sleep(pause)  # by then, what ran out (such as memory) may be available again
            pause = min(2 * pause + 1, LONGEST_PAUSE_SECONDS)
            try:
                self.server.restart()
                self.server.wait_until_ready()
                return
            except temporary as error:
                problem = str(error)
        self.server.stop()
        tail = "" if "Last lines of" in problem else f"\n{self.server.log_tail()}"
        raise LostEngineError(
            f"engine {self.engine} was lost again after engine.max_restarts = {self.max_restarts} restarts: "
            f"{problem}{tail}"
        )
