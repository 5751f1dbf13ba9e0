"""docker/compose.yaml and the config it serves."""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from dicom_xai import config
from dicom_xai.service.check import route_problems

REPOSITORY = Path(__file__).parents[3]
DOCKER = REPOSITORY / "docker"
LONGEST_STOP_S = 30  #: TimeoutStopSec of the systemd units: what a role may take to end


@pytest.fixture(scope="module")
def compose() -> Any:
    return yaml.safe_load((DOCKER / "compose.yaml").read_text("utf-8"))


def test_there_are_the_service_and_its_three_companions(compose: Any) -> None:
    assert set(compose["services"]) == {"dicom-xai", "orthanc", "prometheus", "grafana"}


def test_every_port_is_bound_to_loopback(compose: Any) -> None:
    ports = [port for service in compose["services"].values() for port in service["ports"]]
    assert ports
    assert all(str(port).startswith("127.0.0.1:") for port in ports)


def test_every_foreign_image_is_pinned_to_a_version(compose: Any) -> None:
    for name, service in compose["services"].items():
        if "build" not in service:
            assert re.search(r":v?\d+\.\d+\.\d+$", service["image"]), f"{name}: {service['image']}"


def test_no_password_is_shipped_and_none_may_be_left_out(compose: Any) -> None:
    orthanc = compose["services"]["orthanc"]["environment"]
    assert orthanc["ORTHANC__AUTHENTICATION_ENABLED"] == "true"
    secrets = [
        orthanc["ORTHANC__REGISTERED_USERS"],
        compose["services"]["grafana"]["environment"]["GF_SECURITY_ADMIN_PASSWORD"],
    ]
    assert all(re.search(r"\$\{\w+_PASSWORD:\?", secret) for secret in secrets)


def test_service_may_write_only_its_state_and_tmp(compose: Any) -> None:
    service = compose["services"]["dicom-xai"]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    writable = [item for item in service["volumes"] if not item.endswith(":ro")]
    assert writable == ["state:/var/lib/dicom-xai"]


def test_a_stop_leaves_time_to_end_what_is_under_way(compose: Any) -> None:
    period = compose["services"]["dicom-xai"]["stop_grace_period"]
    assert int(period.removesuffix("s")) > LONGEST_STOP_S


def test_everything_mounted_from_the_repository_exists(compose: Any) -> None:
    mounts = [item for service in compose["services"].values() for item in service["volumes"]]
    paths = [DOCKER / item.split(":")[0] for item in mounts if item.startswith(".")]
    assert paths
    assert all(path.exists() for path in paths), [path for path in paths if not path.exists()]


def test_gpu_overlay_changes_the_service_only() -> None:
    overlay = yaml.safe_load((DOCKER / "compose.gpu.yaml").read_text("utf-8"))
    assert set(overlay["services"]) == {"dicom-xai"}
    assert overlay["services"]["dicom-xai"]["build"]["args"] == {"ACCELERATOR": "gpu"}


def test_grafana_finds_datasource_and_dashboard(compose: Any) -> None:
    sources = yaml.safe_load((DOCKER / "grafana/datasources/prometheus.yaml").read_text("utf-8"))
    assert [source["type"] for source in sources["datasources"]] == ["prometheus"]
    boards = yaml.safe_load((DOCKER / "grafana/dashboards/dicom-xai.yaml").read_text("utf-8"))
    (provider,) = boards["providers"]
    mounts = compose["services"]["grafana"]["volumes"]
    assert f"../deploy/grafana:{provider['options']['path']}:ro" in mounts


@pytest.fixture
def live(tmp_path: Path) -> config.Config:
    """The config as the container sees it, the image's model folder being the repository's."""
    for file in (DOCKER / "config").iterdir():
        text = file.read_text("utf-8")
        text = text.replace("/usr/share/dicom-xai/models", str(REPOSITORY / "config/models"))
        (tmp_path / file.name).write_text(text, "utf-8")
    loaded, lint = config.load(tmp_path / "dicom-xai.yaml")
    assert lint == []
    return loaded


def test_every_route_does_what_its_tests_say(live: config.Config) -> None:
    assert live.routes.tests
    assert route_problems(live) == []


def test_config_is_valid_and_keeps_its_state_in_the_volume(live: config.Config) -> None:
    state = Path("/var/lib/dicom-xai")
    assert live.service.spool.directory.is_relative_to(state)
    assert live.service.ledger.url.startswith(f"sqlite:///{state}/")


def test_ports_and_networks_of_config_and_compose_agree(live: config.Config, compose: Any) -> None:
    service = live.service
    inside = {int(port.split(":")[-1]) for port in compose["services"]["dicom-xai"]["ports"]}
    listening = {listener.port for listener in service.receive.listeners}
    assert inside == listening | {service.telemetry.port}
    (network,) = compose["networks"]["default"]["ipam"]["config"]
    subnet = ipaddress.ip_network(network["subnet"])
    allowed = [ipaddress.ip_network(item.network) for item in service.receive.allow]
    assert allowed == [subnet], "a network that compose does not make may not send"
    (destination,) = service.destinations.values()
    orthanc = compose["services"]["orthanc"]["environment"]
    assert destination.host in compose["services"]
    assert destination.ae_title == orthanc["ORTHANC__DICOM_AET"]


def test_prometheus_scrapes_the_service(live: config.Config) -> None:
    scrape = yaml.safe_load((DOCKER / "prometheus.yaml").read_text("utf-8"))
    targets = [
        (job["job_name"], target)
        for job in scrape["scrape_configs"]
        for group in job["static_configs"]
        for target in group["targets"]
    ]
    assert targets == [("dicom-xai", f"dicom-xai:{live.service.telemetry.port}")]
