"""An engine's address, and the key that it requires (SGLang's `--api-key`)."""

import os
import secrets
import socket
from dataclasses import dataclass, field

from megatron_dsrl.common.collective import broadcast

API_KEY_VARIABLE = "DSRL_ENGINE_API_KEY"
"""Environment variable with the key of external servers (`engine.urls`), and in a server's own process with its key.
Not a configuration field, since configurations are copied into run folders."""
ANY_PORT = 9
"""The discard service; any port would do, since nothing is sent."""


@dataclass(frozen=True)
class EngineAddress:
    """URL and key of one engine."""

    url: str
    """`http://host:port`."""
    key: str | None = field(default=None, repr=False)
    """Key of every call; None: the engine answers everybody."""

    @property
    def headers(self) -> dict[str, str]:
        """HTTP headers of every call."""
        return {"Authorization": f"Bearer {self.key}"} if self.key else {}


def draw_key() -> str:
    """A random key for the engines that this run starts, the same on all ranks. All ranks call it.

    Without it, every program on the machine could change an engine's weights, and a run could mistake another run's
    engine for its own.
    """
    return broadcast(secrets.token_hex(32))


def external_key() -> str | None:
    """The key of external servers, if the environment has one."""
    return os.environ.get(API_KEY_VARIABLE) or None


def address_towards(host: str, port: int = ANY_PORT) -> str:
    """The local address from which this machine reaches `host`, and under which `host` reaches it. Raises OSError if it
    cannot be resolved or reached."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, port))  # sets the route; a datagram socket sends nothing
        return probe.getsockname()[0]
