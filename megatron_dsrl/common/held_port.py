"""A TCP port for another process, kept from the moment it is chosen.

An engine opens its port only after it has loaded the model, which takes minutes on a GPU. Until then, and between its
end and its restart, the run holds the port with a socket that is bound but does not listen. The kernel does not give a
held port to processes that ask for a free one, but the engine can still bind it, because both use SO_REUSEADDR.
"""

import socket
from collections.abc import Iterable

import psutil

from megatron_dsrl.common.errors import UserError

CONNECT_SECONDS = 1.0
PORT_LOST_STATUS = 98
"""Exit status of a server that could not open its port (the number of EADDRINUSE)."""


class HeldPort:
    """A port that this process holds until `close`."""

    def __init__(self, host: str, port: int | None) -> None:
        """Port None takes a free one. Raises UserError if the port is in use."""
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self._claim = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._socket.bind((host, port or 0))
            self.number: int = self._socket.getsockname()[1]
            # SO_REUSEADDR lets two runs hold the same port; this name in the abstract namespace has one owner.
            self._claim.bind(f"\0megatron-dsrl-{host}-{self.number}")
        except OSError as error:
            self.close()
            raise UserError(
                f"engine.port: port {port} on {host} cannot be used ({error.strerror}): another process is using "
                "it; stop that process, or set another port, or null for any free one"
            ) from error
        self._address = (host, self.number)

    def is_open(self) -> bool:
        """Whether any process listens on the port."""
        try:
            socket.create_connection(self._address, timeout=CONNECT_SECONDS).close()
        except OSError:
            return False
        return True

    def is_open_by(self, processes: Iterable[psutil.Process]) -> bool:
        """Whether one of these processes listens on the port."""
        return any(map(self._listens, processes))

    def close(self) -> None:
        """Give the port up. May be called again."""
        self._socket.close()
        self._claim.close()

    def _listens(self, process: psutil.Process) -> bool:
        try:
            connections = process.net_connections(kind="tcp4")
        except psutil.Error:  # it has ended
            return False
        return any(
            connection.status == psutil.CONN_LISTEN and connection.laddr.port == self.number
            for connection in connections
        )
