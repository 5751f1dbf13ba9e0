"""The HTTP face: what it answers, and what it never says."""

from __future__ import annotations

import socket
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.registry import Collector

from dicom_xai.errors import ConfigError
from dicom_xai.telemetry import HTTPFace


class Probe:
    def __init__(self) -> None:
        self.missing: list[str] = []
        self.alive = True

    def is_alive(self) -> bool:
        return self.alive

    def why_not_ready(self) -> list[str]:
        return self.missing


def get(port: int, path: str) -> tuple[int, str, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
            return answer.status, answer.read().decode(), answer.headers["content-type"]
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode(), error.headers["content-type"]


@pytest.fixture
def probe() -> Probe:
    return Probe()


@pytest.fixture
def face(registry: CollectorRegistry, probe: Probe) -> Iterator[HTTPFace]:
    made = HTTPFace("127.0.0.1", 0, registry, probe)
    made.start()
    yield made
    made.stop()


def test_the_face_answers_metrics_and_probes(face: HTTPFace, probe: Probe) -> None:
    status, text, kind = get(face.port, "/metrics")
    assert status == 200
    assert kind.startswith("text/plain; version=")
    assert "dicom_xai_queue_depth_rows" in text
    assert get(face.port, "/livez")[:2] == (200, "alive\n")
    assert get(face.port, "/readyz")[:2] == (200, "ready\n")
    probe.missing = ["model phantom-cxr is loading", "ledger: locked"]
    probe.alive = False
    assert get(face.port, "/livez")[:2] == (503, "stuck\n")
    assert get(face.port, "/readyz")[:2] == (
        503,
        "model phantom-cxr is loading\nledger: locked\n",
    )
    assert get(face.port, "/elsewhere")[0] == 404


def test_a_taken_port_is_a_config_error_that_names_it(face: HTTPFace, probe: Probe) -> None:
    with pytest.raises(ConfigError, match=rf"telemetry: .*127\.0\.0\.1:{face.port}"):
        HTTPFace("127.0.0.1", face.port, CollectorRegistry(), probe)


def test_a_stopped_face_gives_its_port_back(registry: CollectorRegistry, probe: Probe) -> None:
    face = HTTPFace("127.0.0.1", 0, registry, probe)
    face.start()
    get(face.port, "/livez")
    face.stop()
    with socket.create_server(("127.0.0.1", face.port)):
        pass


class Broken(Collector):
    def collect(self) -> Iterator[object]:  # type: ignore[override]
        raise RuntimeError("PatientName Doe^Jane")


def test_a_scrape_that_fails_shows_nothing_of_the_cause(
    registry: CollectorRegistry, probe: Probe, capfd: pytest.CaptureFixture[str]
) -> None:
    face = HTTPFace("127.0.0.1", 0, registry, probe)
    registry._collector_to_names[Broken()] = []
    face.start()
    status, text, _ = get(face.port, "/metrics")
    face.stop()
    assert (status, "Doe" in text) == (500, False)
    assert "Doe" not in "".join(capfd.readouterr())
