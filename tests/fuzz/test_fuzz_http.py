"""Any bytes on the HTTP port: answered or hung up on, and the next scrape is served."""

from __future__ import annotations

import socket
import urllib.request
from contextlib import suppress

import pytest
from h11 import LocalProtocolError
from prometheus_client import CollectorRegistry

from dicom_xai.telemetry import HTTPFace, Metrics
from tests.make.fuzzing import Fuzz, spoilt

REQUESTS = [
    b"GET /metrics HTTP/1.1\r\nHost: a\r\nAccept: text/plain\r\nConnection: close\r\n\r\n",
    b"GET /livez HTTP/1.0\r\n\r\n",
    b"HEAD /readyz?x=%2e%2e/ HTTP/1.1\r\nHost: a\r\n\r\nGET /livez HTTP/1.1\r\nHost: a\r\n\r\n",
    b"POST /livez HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello",
    b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    b"GET /../../etc/passwd HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: upgrade\r\n"
    b"Expect: 100-continue\r\nCookie: " + b"a" * 300 + b"\r\n\r\n",
]


class Well:
    """Nothing is wrong."""

    def is_alive(self) -> bool:
        """Yes."""
        return True

    def why_not_ready(self) -> list[str]:
        """Nothing."""
        return []


def test_no_request_ends_the_http_face(fuzz: Fuzz, caplog: pytest.LogCaptureFixture) -> None:
    registry = CollectorRegistry()
    Metrics(registry)
    face = HTTPFace("127.0.0.1", 0, registry, Well())
    face.start()

    def trial(data: bytes) -> None:
        with (
            socket.create_connection(("127.0.0.1", face.port), timeout=10) as sock,
            suppress(ConnectionError),
        ):
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(65536):
                pass
        raised = [each.exc_info[0] for each in caplog.records if each.exc_info]
        # h11's word for a peer that left before its answer
        assert [kind for kind in raised if kind is not LocalProtocolError] == []
        caplog.clear()

    try:
        fuzz.run("http", trial, spoilt(REQUESTS), 600)
        with urllib.request.urlopen(f"http://127.0.0.1:{face.port}/livez", timeout=10) as answer:
            assert answer.read() == b"alive\n"
    finally:
        face.stop()
