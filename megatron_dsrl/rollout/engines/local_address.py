"""The address under which another machine can reach this one."""

import socket

ANY_PORT = 9
"""The discard service; any port would do, since nothing is sent."""


def address_towards(host: str, port: int = ANY_PORT) -> str:
    """The local address from which this machine reaches `host`.

    Raises:
        OSError: `host` cannot be resolved or reached.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, port))  # sets the route; a datagram socket sends nothing
        return probe.getsockname()[0]
