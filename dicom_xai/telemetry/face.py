"""The HTTP face: metrics for Prometheus, probes for whoever restarts us."""

from __future__ import annotations

import os
import socket
import threading
from typing import TYPE_CHECKING, Protocol

from prometheus_client import CollectorRegistry

from dicom_xai.errors import ConfigError

if TYPE_CHECKING:
    import uvicorn

#: From a connection to the last byte of its answer: far longer than a scrape takes.
DEADLINE_S = 10.0


class Health(Protocol):
    """What the probes ask. A dead destination makes neither of them false."""

    def is_alive(self) -> bool:
        """Whether the main loops tick."""

    def why_not_ready(self) -> list[str]:
        """What is missing until work can be taken; empty when ready."""


class HTTPFace:
    """/metrics, /livez and /readyz on a thread of its own.

    Parameters
    ----------
    host : str
    port : int
        0 takes a free one; `port` tells which.
    registry : CollectorRegistry
    health : Health
    deadline_s : float
        After so long a connection ends, whatever the client does.

    Raises
    ------
    ConfigError
        The address cannot be listened on.
    """

    def __init__(
        self,
        host: str,
        port: int,
        registry: CollectorRegistry,
        health: Health,
        deadline_s: float = DEADLINE_S,
    ) -> None:
        self._server = _http_server(host, port, registry, health, deadline_s)
        self._socket = _listening(host, port)
        self.port: int = self._socket.getsockname()[1]
        self._thread = threading.Thread(
            target=self._server.run, args=([self._socket],), name="http", daemon=True
        )

    def start(self) -> None:
        """Answer from now on."""
        self._thread.start()

    def stop(self) -> None:
        """Stop answering and close the port."""
        self._server.should_exit = True
        self._thread.join(timeout=5)
        self._socket.close()


def _listening(host: str, port: int) -> socket.socket:
    """A socket that listens already; the server's own would end the process on a taken port."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise ConfigError(
            f"telemetry: {host}:{port} cannot be listened on ({os.strerror(error.errno or 0)}); "
            "change telemetry.host or telemetry.port"
        ) from error


def _http_server(
    host: str, port: int, registry: CollectorRegistry, health: Health, deadline_s: float
) -> uvicorn.Server:
    import uvicorn
    from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import PlainTextResponse, Response
    from starlette.routing import Route

    from dicom_xai.telemetry.patience import BACKLOG, patient_for

    def metrics(_: Request) -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    def livez(_: Request) -> Response:
        alive = health.is_alive()
        return PlainTextResponse("alive\n" if alive else "stuck\n", 200 if alive else 503)

    def readyz(_: Request) -> Response:
        missing = health.why_not_ready()
        return PlainTextResponse("\n".join(missing or ["ready"]) + "\n", 503 if missing else 200)

    app = Starlette(
        routes=[Route("/metrics", metrics), Route("/livez", livez), Route("/readyz", readyz)]
    )
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        log_config=None,
        access_log=False,
        lifespan="off",
        http=patient_for(deadline_s),
        headers=[("Connection", "close")],
        backlog=BACKLOG,
    )
    return uvicorn.Server(config)
