"""uvicorn's HTTP/1.1 with the limits that it lacks: on the time and size of a request's head, and on connections.

Errors found here, before there is a request to route, are JSON in OpenAI's form. A connection that is closed upon an
answer lingers: what the client still sends is dropped for a while, since closing upon unread bytes resets the
connection, and the answer may be lost.
"""

import asyncio
import logging
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..errors import RequestError

HEAD_SECONDS = 20.0  # from the first moment, or a later request's first byte, to the end of its headers
MOST_HEAD_BYTES = 64 * 1024
MOST_HEADERS = 100
KEEP_ALIVE_SECONDS = 75  # between two requests: longer than clients keep their end
LINGER_SECONDS = 2.0  # without a byte from a client that has its answer and does not hang up
MOST_LINGER_SECONDS = 20.0  # for one that goes on sending, or does not read
MOST_CONNECTIONS = 512
RETRY_SECONDS = 5


class CheckedConnection(h11.Connection):
    """h11's parser, which remembers its complaint and limits what a head holds."""

    def __init__(self) -> None:
        super().__init__(h11.SERVER, max_incomplete_event_size=MOST_HEAD_BYTES)
        self.fault: h11.RemoteProtocolError | None = None

    def next_event(self) -> Any:
        try:
            event = super().next_event()
            if isinstance(event, h11.Request) and _is_too_long(event):
                raise h11.RemoteProtocolError("the request's head is too long", error_status_hint=431)
            return event
        except h11.RemoteProtocolError as error:
            self.fault = error
            raise


def _is_too_long(head: h11.Request) -> bool:
    """h11 itself looks at the size of heads only where they come in several pieces."""
    size = len(head.target) + sum(len(name) + len(value) for name, value in head.headers)
    return len(head.headers) > MOST_HEADERS or size > MOST_HEAD_BYTES


class LingeringTransport:
    """An asyncio transport whose `close` sends what is to be sent, says that no more comes, and waits for the client's
    own end. `finish` closes at once.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop):
        self._transport = transport
        self._loop = loop
        self._silence: asyncio.TimerHandle | None = None
        self._end: asyncio.TimerHandle | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    @property
    def lingers(self) -> bool:
        return self._end is not None

    def is_closing(self) -> bool:
        return self.lingers or self._transport.is_closing()

    def close(self) -> None:
        if self.is_closing():
            return
        self._end = self._loop.call_later(MOST_LINGER_SECONDS, self._transport.abort)
        self.heard()
        self._transport.resume_reading()
        try:
            self._transport.write_eof()
        except (OSError, RuntimeError):  # gone already
            self._transport.abort()

    def heard(self) -> None:
        """The client sent something while the connection lingers."""
        if self._silence is not None:
            self._silence.cancel()
        self._silence = self._loop.call_later(LINGER_SECONDS, self._transport.close)

    def finish(self) -> None:
        self._transport.close()

    def forget(self) -> None:
        """The connection is no more."""
        for timer in (self._silence, self._end):
            if timer is not None:
                timer.cancel()


class LimitedProtocol(H11Protocol):
    """One connection. The application finds `hang_up` in its scope's state."""

    transport: LingeringTransport  # type: ignore[assignment]
    conn: CheckedConnection

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.conn = CheckedConnection()
        self._head: asyncio.TimerHandle | None = None
        self._later = b""  # of the next request, which came during the present one's answer
        self.app_state = {**self.app_state, "hang_up": self.hang_up}

    def hang_up(self) -> None:
        """Ends the connection without an answer, or amid one: for a client that has left or does not read."""
        if self.cycle is not None:
            self.cycle.disconnected = True
        self.transport.abort()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(LingeringTransport(transport, self.loop))  # type: ignore[arg-type]
        if len(self.connections) > MOST_CONNECTIONS:
            self._refuse(RequestError(503, "too many connections", retry_after_seconds=RETRY_SECONDS))
        else:
            self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_came()
        self.transport.forget()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.lingers:
            self.transport.heard()
            return
        if self._answers:
            self._later += data
            if len(self._later) > MOST_HEAD_BYTES:
                self.flow.pause_reading()
            return
        if self._head is None and self.conn.their_state is h11.IDLE:
            self._wait_for_head()
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._head_came()

    @property
    def _answers(self) -> bool:
        """Whether a request has come entirely and its answer has not gone."""
        whole = self.conn.their_state in (h11.DONE, h11.MUST_CLOSE)
        return whole and self.cycle is not None and not self.cycle.response_complete

    def handle_events(self) -> None:
        super().handle_events()
        if self._answers:  # uvicorn reads no more where another request has begun: a client's end would go unnoticed
            self.flow.resume_reading()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        later, self._later = self._later, b""
        if later and not self.transport.is_closing():
            self.data_received(later)

    def eof_received(self) -> bool:  # type: ignore[override]
        """Returns whether the connection stays open for an answer: a client may end its side and still read."""
        if self.transport.lingers or self.conn.their_state is h11.IDLE:
            return False
        if self.conn.their_state is h11.SEND_BODY:
            self.conn.receive_data(b"")
            self.handle_events()  # a body that is not whole
            return False
        if self.cycle is not None:
            # `receive` returns, which says that the client has left; an answer that is ready may still reach it.
            self.cycle.keep_alive = False
            self.cycle.message_event.set()
        return True

    def send_400_response(self, msg: str) -> None:
        """What uvicorn calls where h11 understands nothing."""
        fault = self.conn.fault
        if fault is None:
            self._refuse(RequestError(400, msg))
        elif fault.error_status_hint == 431:
            self._refuse(RequestError(431, "the request's head is too long"))
        elif self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self._refuse(RequestError(fault.error_status_hint, str(fault)))
        else:  # amid an answer
            self.transport.close()

    def timeout_keep_alive_handler(self) -> None:
        if self.transport.get_write_buffer_size():  # of a client that does not read its answer
            self.transport.abort()
        else:
            self.transport.finish()

    def shutdown(self) -> None:
        """The server ends: idle connections at once, others after their answer."""
        if self.transport.lingers or self.cycle is None or self.cycle.response_complete:
            self.transport.finish()
        else:
            super().shutdown()

    def _wait_for_head(self) -> None:
        self._head = self.loop.call_later(HEAD_SECONDS, self._too_slow)

    def _head_came(self) -> None:
        if self._head is not None:
            self._head.cancel()
            self._head = None

    def _too_slow(self) -> None:
        self._head = None
        if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
            self._refuse(RequestError(408, f"the request's head did not arrive within {HEAD_SECONDS:g} s"))

    def _refuse(self, error: RequestError) -> None:
        """Answers instead of the application, and closes."""
        self._head_came()
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True  # the application learns that it is no longer asked
            self.cycle.message_event.set()
        body = error.body()
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), "Connection": "close"}
        response = h11.Response(
            status_code=error.status,
            headers=[(name.encode(), value.encode()) for name, value in (headers | error.headers).items()],
        )
        logging.info("%s: %d %s", self.client, error.status, error)
        for event in (response, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event))
        self.transport.close()
