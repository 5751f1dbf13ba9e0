"""How long the HTTP face bears with a client, and with how many: no request holds it for ever.

uvicorn gives up no client that has begun a request and stays, nor one that does not read its
answer, and it counts no connections. Here a connection ends by a deadline whatever it does,
and carries one request; above `MOST_CONNECTIONS` the oldest ends, so that a flood of them takes
neither the descriptors of the process nor the scrape of a good client.
"""

from __future__ import annotations

import asyncio
from typing import Any, ClassVar

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

#: Connections at once; many systems let a process open 1024 files, and ours has others to open.
MOST_CONNECTIONS = 128
#: So many that wait are accepted in one go, before any of them is counted.
BACKLOG = 128


def patient_for(deadline_s: float) -> type[asyncio.Protocol]:
    """The protocol of one server, for `uvicorn.Config(http=...)`.

    Parameters
    ----------
    deadline_s : float
        After so long a connection ends.
    """

    class Protocol(_Protocol):
        patience_s = deadline_s
        open_ones: ClassVar[dict[_Protocol, None]] = {}

    return Protocol


class _Protocol(H11Protocol):
    patience_s: ClassVar[float]
    open_ones: ClassVar[dict[_Protocol, None]]  #: in order of arrival

    def __init__(
        self,
        config: uvicorn.Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._deadline = self.loop.call_later(self.patience_s, self.hang_up)
        self.open_ones[self] = None
        if len(self.open_ones) > MOST_CONNECTIONS:
            next(iter(self.open_ones)).hang_up()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget()
        super().connection_lost(exc)

    def hang_up(self) -> None:
        """End now; what the client has not read yet is dropped."""
        self._forget()
        self.transport.abort()

    def _forget(self) -> None:
        self.open_ones.pop(self, None)
        if self._deadline is not None:
            self._deadline.cancel()
