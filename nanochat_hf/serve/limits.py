"""What one client may cost the server: bytes of a body, seconds to send it, connections, lines of the log."""

import logging
import sys
import time

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

MAX_BODY = 1 << 20  # bytes of a request
RECEIVE_TIMEOUT = 20.0  # seconds in which a request must have come, its body included
KEEP_ALIVE = 15  # seconds that an idle connection stays: longer than clients wait, or they meet a closed one
MAX_CONNECTIONS = 512
BUSY = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 2\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"


class TooLargeError(Exception):
    """A body of more than MAX_BODY bytes, or of unknown length."""


class LimitedProtocol(H11Protocol):
    """uvicorn's connection, which ends when a request does not arrive in time or too many are open."""

    def connection_made(self, transport) -> None:
        super().connection_made(transport)
        self.expect_request()
        if len(self.connections) > connection_limit():
            transport.write(BUSY)
            transport.close()

    def expect_request(self) -> None:
        self.deadline = self.loop.call_later(RECEIVE_TIMEOUT, self.end_if_waiting)

    def end_if_waiting(self) -> None:
        if self.conn.their_state in (h11.IDLE, h11.SEND_BODY):
            self.transport.abort()

    def send_400_response(self, msg: str) -> None:
        """Of a client that broke the protocol: the request ends, with this answer if none has begun."""
        if self.cycle:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        self.transport.close()

    def on_response_complete(self) -> None:
        self.deadline.cancel()
        self.expect_request()
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self.deadline.cancel()
        super().connection_lost(exc)


def connection_limit() -> int:
    """Half of the descriptors that the process may open, at most MAX_CONNECTIONS."""
    try:
        import resource
    except ImportError:  # Windows
        return MAX_CONNECTIONS
    return min(MAX_CONNECTIONS, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)


class OncePerMinute(logging.Filter):
    """Lets each kind of message through once per minute: whoever sends broken requests must not fill the disk."""

    def __init__(self):
        super().__init__()
        self.times: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        key, now = str(record.msg)[:60], time.monotonic()
        if now - self.times.get(key, -60.0) < 60:
            return False
        self.times[key] = now
        return True


def run(app, host: str, port: int) -> None:
    """Serve until a signal comes; streams that run then get five seconds to end."""
    once = OncePerMinute()
    sys.setswitchinterval(0.001)  # seconds that the event loop may wait for a thread that reads a request
    options = {"timeout_graceful_shutdown": 5, "timeout_keep_alive": KEEP_ALIVE, "backlog": 128, "ws": "none"}
    config = uvicorn.Config(app, host, port, http=LimitedProtocol, log_level="warning", **options)
    for name in ("uvicorn.error", "asyncio"):
        logging.getLogger(name).addFilter(once)
    uvicorn.Server(config).run()
