"""The socket, and uvicorn in a thread of its own."""

import socket
import threading

import uvicorn

from ...errors import MimoError
from .app import App
from .protocol import KEEP_ALIVE_SECONDS, LimitedProtocol

BACKLOG = 512
GRACE_SECONDS = 2  # for answers that are written when the listener stops


class Listener:
    """Listens from the first; `start` answers."""

    def __init__(self, host: str, port: int, app: App):
        """Raises MimoError where it cannot listen there."""
        self._socket = _listen(host, port)
        self._address = self._socket.getsockname()[:2]
        config = uvicorn.Config(
            app,
            loop="asyncio",
            http=LimitedProtocol,
            ws="none",
            lifespan="off",
            interface="asgi3",
            log_config=None,
            log_level="error",
            access_log=False,
            server_header=False,
            headers=[("Server", "mlx_mimo")],
            backlog=BACKLOG,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=GRACE_SECONDS,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._serve, name="http", daemon=True)

    @property
    def url(self) -> str:
        host, port = self._address
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    @property
    def connections(self) -> list[LimitedProtocol]:
        """Open ones, idle ones included."""
        return [one for one in list(self._server.server_state.connections) if isinstance(one, LimitedProtocol)]

    def start(self) -> None:
        self._thread.start()

    def stop(self, seconds: float) -> None:
        """Closes socket and connections, at once where nothing is being answered."""
        self._server.should_exit = True
        if self._thread.is_alive():
            self._thread.join(seconds)
        self._socket.close()

    def _serve(self) -> None:
        self._server.run(sockets=[self._socket])


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        # asyncio sends small pieces without delay only where the protocol is named.
        listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address)
            listening.listen(BACKLOG)
        except OSError:
            listening.close()
            raise
    except OSError as error:
        raise MimoError(f"--host {host} --port {port}: cannot listen there: {error.strerror or error}") from None
    return listening
