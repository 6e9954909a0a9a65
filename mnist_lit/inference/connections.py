"""The connections of the server: how many there may be, how long each may wait for its client, and errors as JSON.

uvicorn by itself keeps a connection that never sends a request, accepts connections until no file descriptor is left,
and answers what is not HTTP with plain text. Here a client that is ready is always answered, because there is always
room: while all places are taken, the connection that has waited longest for its client is closed.
"""

import asyncio
import contextlib
import resource
import socket
import sys
import time
from collections.abc import Callable
from http import HTTPStatus
from typing import cast

import h11
import uvicorn
from starlette.responses import JSONResponse
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from mnist_lit.inference.web import HEADERS

MAX_CONNECTIONS = 500
MAX_SECONDS = 10.0  # that a client has to send a request's head, and then to send the rest and take its answer
MIN_SECONDS = 0.1  # that a client has to go on, however many others are there
GRACE_SECONDS = 2.0  # for the requests in progress when the server is told to stop


def run(app: ASGIApp, listener: socket.socket, ready: Callable[[], None]) -> None:
    """Serve ``app`` until interrupted by a signal; calls ``ready`` once requests are accepted."""
    config = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        lifespan="off",
        log_level="error",  # a client's mistakes are warnings, and would fill the terminal
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=int(GRACE_SECONDS) + 1,
    )
    _Server(config, ready).run([listener])


def max_connections() -> int:
    """``MAX_CONNECTIONS``, or fewer where the process may not open that many files.

    Each connection may need a second descriptor, for a file of the page; 32 are for everything else.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_CONNECTIONS if limit == resource.RLIM_INFINITY else max(4, min(MAX_CONNECTIONS, (limit - 32) // 2))


class _Connection(H11Protocol):
    """One client's connection; ``since`` is when it began to wait for a request, or the request in progress began."""

    since: float

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.since = time.monotonic()
        super().connection_made(transport)

    def handle_events(self) -> None:
        before = self.cycle
        super().handle_events()
        if self.cycle is not before:
            self.since = time.monotonic()

    def on_response_complete(self) -> None:
        self.since = time.monotonic()
        super().on_response_complete()

    @property
    def in_progress(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    @property
    def waits_for_client(self) -> bool:
        """Whether nothing happens until the client sends more, or reads what was sent to it."""
        return not self.in_progress or self.cycle.more_body or self.flow.write_paused

    def end_if_overdue(self) -> None:
        if not self.waits_for_client or time.monotonic() - self.since < MAX_SECONDS:
            return
        half_a_head, _ = self.conn.trailing_data
        if half_a_head and not self.in_progress and not self.transport.is_closing():
            self._answer(408, f"the head of the request did not arrive within {MAX_SECONDS:g} seconds")
        else:
            self.transport.abort()

    def send_400_response(self, msg: str) -> None:
        self._answer(400, "this is not a valid HTTP/1.1 request")

    def _answer(self, status: int, error: str) -> None:
        """Answer without the application, and close."""
        if self.cycle:
            self.cycle.disconnected = True  # the application has nobody to answer any more
        response = JSONResponse({"error": error}, status, {**HEADERS, "Connection": "close"})
        with contextlib.suppress(h11.LocalProtocolError):  # another answer has begun
            head = h11.Response(
                status_code=status, headers=response.raw_headers, reason=HTTPStatus(status).phrase.encode()
            )
            for event in (head, h11.Data(data=bytes(response.body)), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def shutdown(self) -> None:
        super().shutdown()
        self.loop.call_later(GRACE_SECONDS, self.transport.abort)


class _Server(uvicorn.Server):
    """Accepts connections itself, one at a time, so that there are never more than it has room for."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self.ready, self.room, self.warned = ready, max_connections(), False

    @property
    def connections(self) -> set[_Connection]:
        return cast(set[_Connection], self.server_state.connections)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup([])
        (listener,) = sockets or []
        self.acceptor = asyncio.create_task(self._accept(listener))
        self.ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.acceptor.cancel()
        await asyncio.wait([self.acceptor])
        await super().shutdown(sockets)
        for connection in list(self.connections):  # a second Ctrl-C did not wait for them
            connection.transport.abort()
        if tasks := self.server_state.tasks:
            await asyncio.wait(tasks, timeout=1)

    async def on_tick(self, counter: int) -> bool:
        if counter % 10 == 0:  # every second
            for connection in list(self.connections):
                connection.end_if_overdue()
        return await super().on_tick(counter)

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        listener.setblocking(False)
        while True:
            while len(self.connections) >= self.room and not self._make_room():
                await asyncio.sleep(0.01)
            try:
                client, _ = await loop.sock_accept(listener)
            except ConnectionError:  # the client has gone
                continue
            except OSError as error:  # no file descriptor is left, or no memory
                self._warn_once(error)
                self._make_room()
                await asyncio.sleep(0.1)
                continue
            try:
                # Otherwise the body of an answer waits 40 ms for the client's word that it has received the head.
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                await loop.connect_accepted_socket(self._connection, client)
            except OSError:  # the client has gone
                client.close()

    def _connection(self) -> _Connection:
        return _Connection(self.config, self.server_state, self.lifespan.state)

    def _make_room(self) -> bool:
        """Close the connection that has waited longest for its client; False if none has waited for ``MIN_SECONDS``."""
        latest = time.monotonic() - MIN_SECONDS
        waiting = [each for each in self.connections if each.waits_for_client and each.since < latest]
        if not waiting:
            return False
        longest = min(waiting, key=lambda each: (each.in_progress, each.since))
        longest.transport.abort()
        self.connections.discard(longest)  # it does so itself only a moment later
        return True

    def _warn_once(self, error: OSError) -> None:
        if not self.warned:
            self.warned = True
            print(
                f"warning: cannot accept more connections for now ({error}); allow more with ulimit -n", file=sys.stderr
            )
