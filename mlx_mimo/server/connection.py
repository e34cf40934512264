"""One HTTP connection: deadlines, limits, and errors that are JSON whatever happens. Knows nothing of models."""

import contextlib
import io
import json
import logging
import select
import socket
import threading
import time
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from .body import parse
from .errors import RequestError

HEAD_SECONDS = 20.0  # from the connection to the end of its headers
WRITE_SECONDS = 60.0  # a client that reads nothing for so long has gone
MOST_HEAD_BYTES = 64 * 1024
LINGER_SECONDS = 2.0  # without a byte from a client that has its answer and does not hang up
MOST_LINGER_SECONDS = 20.0  # for one that goes on sending


class TooSlow(Exception):
    """What was to be read did not come in time. No TimeoutError: the base class takes those for itself, in silence."""


class DeadlineSocket(io.RawIOBase):
    """Reads from a socket until `deadline`, however slowly the bytes trickle in."""

    def __init__(self, connection: socket.socket):
        self.connection = connection
        self.deadline = time.monotonic() + HEAD_SECONDS
        self.allowance = MOST_HEAD_BYTES

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        remaining = self.deadline - time.monotonic()
        if remaining <= 0:
            raise TooSlow
        if self.allowance <= 0:
            raise OverflowError("the request's head is too long")
        self.connection.settimeout(remaining)
        try:
            count = self.connection.recv_into(buffer)
        except TimeoutError:
            raise TooSlow from None
        finally:
            self.connection.settimeout(WRITE_SECONDS)
        self.allowance -= count
        return count


class JsonHandler(BaseHTTPRequestHandler):
    """What every answer has in common. `most_body_bytes` and `body_seconds` bound what a client may send."""

    server_version = "mlx_mimo"
    sys_version = ""
    most_body_bytes = 32 * 1024 * 1024
    body_seconds = 60.0

    def setup(self) -> None:
        super().setup()
        self.source = DeadlineSocket(self.connection)
        self.rfile = io.BufferedReader(self.source)
        self.connection.settimeout(WRITE_SECONDS)
        self.answered = False
        self.requestline, self.command = "", ""

    def finish(self) -> None:
        super().finish()
        self.linger()

    def linger(self) -> None:
        """Drops what the client still sends: closing upon unread bytes resets the connection, the answer is lost."""
        deadline = time.monotonic() + MOST_LINGER_SECONDS
        try:
            self.connection.shutdown(socket.SHUT_WR)
            while (remaining := deadline - time.monotonic()) > 0:
                self.connection.settimeout(min(remaining, LINGER_SECONDS))
                if not self.connection.recv(65536):
                    return
        except OSError:  # gone already, or silent: either way it has had its time
            return

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except OverflowError as error:
            self.close_connection = True
            self.send_failure(RequestError(431, str(error)))
        except TooSlow:
            self.close_connection = True
            self.send_failure(RequestError(408, f"the request's head did not arrive within {HEAD_SECONDS:g} s"))
        except (ConnectionError, TimeoutError):
            self.close_connection = True  # gone, or as good as gone

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """The base class's own complaints, as JSON."""
        self.send_failure(RequestError(int(code), message or HTTPStatus(code).phrase))

    def send_failure(self, error: RequestError) -> None:
        if getattr(self, "request_version", "HTTP/0.9") == "HTTP/0.9":
            # Not understood so far: the answer has a status line and headers all the same.
            self.request_version = "HTTP/1.0"
            self.requestline = self.requestline or "?"
        self.send_json(error.body(), error.status, error.headers)

    def send_json(self, body: bytes | dict, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_body(body, "application/json", status, headers)

    def send_body(self, body: bytes, kind: str, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.begin(kind, status, {"Content-Length": str(len(body))} | (headers or {}))
        if self.command != "HEAD":
            self.wfile.write(body)
            self.wfile.flush()

    def begin(self, kind: str, status: int, headers: dict[str, str]) -> None:
        """Status line and headers."""
        self.answered = True
        self.send_response(status)
        self.send_header("Content-Type", kind)
        for name, value in headers.items():
            self.send_header(name, value)
        self.extra_headers()
        self.end_headers()

    def extra_headers(self) -> None:
        self.send_header("X-Content-Type-Options", "nosniff")

    def read_body(self) -> dict:
        """The request's JSON object. Raises RequestError."""
        if self.headers.get("Transfer-Encoding"):
            raise RequestError(411, "Content-Length: expected instead of Transfer-Encoding")
        text = self.headers.get("Content-Length")
        if text is None:
            raise RequestError(411, "Content-Length: expected")
        if not text.isascii() or not text.isdigit() or len(text) > 18:
            raise RequestError(400, "Content-Length: a whole number expected")
        length = int(text)
        if length > self.most_body_bytes:
            raise RequestError(413, f"the body may have {self.most_body_bytes:,} bytes, {length:,} announced")
        self.source.deadline = time.monotonic() + self.body_seconds
        self.source.allowance = self.most_body_bytes + MOST_HEAD_BYTES
        try:
            raw = self.rfile.read(length)
        except TooSlow:
            raise RequestError(408, f"the body did not arrive within {self.body_seconds:g} s") from None
        if len(raw) < length:
            raise RequestError(400, f"the body ended after {len(raw):,} of {length:,} bytes")
        return parse(raw)

    def connected(self) -> bool:
        """Whether the client is still there, as far as its socket tells."""
        try:
            ready = select.poll()
            ready.register(self.connection, select.POLLIN)
            # What comes after a request is not read by anyone, and would hide the end that comes after it.
            return not ready.poll(0) or bool(self.connection.recv(65536))
        except (OSError, ValueError):
            return False

    def log_message(self, format: str, *args) -> None:
        logging.info("%s %s", self.client_address[0], format % args)


class Server(ThreadingHTTPServer):
    """A thread a connection, at most `most_connections` of them."""

    daemon_threads = True
    request_queue_size = 512
    most_connections = 512

    def __init__(self, address: tuple, handler, family: int = socket.AF_INET):
        self.address_family = family
        self._room = threading.BoundedSemaphore(self.most_connections)
        super().__init__(address, handler)

    def process_request(self, request, client_address) -> None:
        if self._room.acquire(blocking=False):
            try:
                super().process_request(request, client_address)
            except RuntimeError:  # the system has no thread left
                self._room.release()
                raise
            return
        body = RequestError(503, "too many connections").body()
        head = "HTTP/1.0 503 Busy\r\nContent-Type: application/json\r\nRetry-After: 5\r\n"
        head += f"Content-Length: {len(body)}\r\n\r\n"
        try:
            request.settimeout(1)
            request.sendall(head.encode() + body)
            request.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                request.recv(65536)  # what has come already: see JsonHandler.linger, for which there is no time here
        except OSError:
            logging.info("%s: gone before it could be turned away", client_address[0])
        self.shutdown_request(request)

    def process_request_thread(self, request, client_address) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._room.release()

    def handle_error(self, request, client_address) -> None:
        logging.exception("%s: a connection failed", client_address[0])
