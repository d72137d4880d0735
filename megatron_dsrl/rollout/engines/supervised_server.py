"""What turns an SGLang server into a dependable engine: its first requests, and a limited number of restarts."""

import logging
import time
from dataclasses import dataclass, replace

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.rollout.engines.address import EngineAddress
from megatron_dsrl.rollout.engines.client import EngineClient
from megatron_dsrl.rollout.engines.errors import EngineStartError, LostEngineError
from megatron_dsrl.rollout.engines.generation import SampleRequest
from megatron_dsrl.rollout.engines.server import EngineServer
from megatron_dsrl.rollout.sample import SamplingParameters

logger = logging.getLogger(__name__)

LONGEST_PAUSE_SECONDS = 30.0

WARM_UP_REQUESTS = 4
PROMPT_TOKENS = 16
NEW_TOKENS = 8


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


def kinds_of_requests(return_routed_experts: bool) -> list[SamplingParameters]:
    """Sampling parameters that take different kernels: all tokens, the most likely one, and a part of them."""
    plain = SamplingParameters(NEW_TOKENS, stop_token_ids=(), return_routed_experts=return_routed_experts)
    return [plain, replace(plain, temperature=0.0), replace(plain, top_p=0.9, top_k=20)]


async def warm_up(address: EngineAddress, return_routed_experts: bool, timeout_seconds: float) -> None:
    """Sample a few tokens in every way in which training and evaluation may sample.

    An engine compiles kernels when it first needs them, which takes minutes where nothing is cached. Its scheduler
    answers nothing meanwhile, and during sampling that would count as a hang.

    `timeout_seconds` limits each kind of request. Raises EngineError if the engine refuses one, is gone, or too slow.
    """
    prompt = tuple(range(1, PROMPT_TOKENS + 1))
    requests = [SampleRequest(prompt, seed=number, max_new_tokens=NEW_TOKENS) for number in range(WARM_UP_REQUESTS)]
    async with EngineClient(address, timeout_seconds) as client:
        for sampling in kinds_of_requests(return_routed_experts):
            await client.generate(requests, sampling, timeout_seconds)
