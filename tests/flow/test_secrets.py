"""Passwords of a service that has some: where they may not be found."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from dicom_xai.config import ClientTLS, Destination
from dicom_xai.deliver.storage_scu import StorageSCU
from dicom_xai.demo.site import Site
from tests.flow.conftest import ROUTES_TO_PACS
from tests.make.books import deliveries_of, wait_until
from tests.make.certificates import Authority
from tests.make.collector import Collector
from tests.make.command import Running, command
from tests.make.studies import a_radiograph, study_of

#: Of the listener's key, in the environment; of ours, in a file; and one in the config, by mistake.
AT_THE_DOOR, IN_A_FILE, BY_MISTAKE = "QUAGGA-door", "QUAGGA-file", "QUAGGA-yaml"


@pytest.fixture
def site(
    new_site: Callable[..., Site],
    authority: Authority,
    collector: Collector,
    monkeypatch: pytest.MonkeyPatch,
) -> Site:
    """Its listener speaks TLS, its collector too; `vault`, a second destination, ought to."""
    monkeypatch.setenv("DOOR_PASSWORD", AT_THE_DOOR)
    door = authority.sign("door", password=AT_THE_DOOR.encode())
    us = authority.sign("us", file="locked", password=IN_A_FILE.encode())
    file = authority.folder / "password"
    file.touch(mode=0o600)
    file.write_text(f"{IN_A_FILE}\n")
    ours = (
        f"tls: {{ca: {authority.ca}, certificate: {us.certificate}, private_key: {us.private_key},"
        f" private_key_password: {{file: {file}}}, server_name: collector}}"
    )
    made = new_site(
        routes=ROUTES_TO_PACS.replace("to: [pacs]", "to: [pacs, vault]"),
        settings={"audit": f"  syslog: {{host: 127.0.0.1, port: {collector.port}, {ours}}}"},
        destinations={"vault": "VAULT@127.0.0.1:1"},
    )
    made.pacs.start()
    made.write_config()
    listening = (
        f"tls: {{ca: {authority.ca}, certificate: {door.certificate},"
        f" private_key: {door.private_key}, private_key_password: {{variable: DOOR_PASSWORD}}}}"
    )
    text = made.config.read_text()
    for old, new in (
        (f"port: {made.port}}}", f"port: {made.port}, {listening}}}"),
        ("port: 1}", f"port: {made.pacs.port}, {ours}}}"),  # it speaks no TLS: that is told too
    ):
        assert old in text
        text = text.replace(old, new)
    made.config.write_text(text)
    return made


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "tls")


@pytest.fixture
def collector(authority: Authority) -> Iterator[Collector]:
    with Collector(authority) as started:
        yield started


def process_list(running: Running, seen: dict[str, str]) -> None:
    """Add the command lines and environments of all processes that run now."""
    for each in running.family():
        try:
            words = " ".join(each.cmdline())
            held = each.environ()
        except psutil.NoSuchProcess:
            continue
        if not words:  # it has ended since, and waits to be asked how
            continue
        seen[f"command line of {each.pid}"] = words
        assert held.pop("DOOR_PASSWORD") == AT_THE_DOOR  # it was given so, and is nowhere else
        seen[f"environment of {each.pid}"] = str(held)


@pytest.mark.slow
@pytest.mark.promise("K7")
def test_a_secret_is_in_no_process_list_log_metric_report_or_file(
    site: Site, authority: Authority, collector: Collector
) -> None:
    running = Running(site).wait_until_ready()
    seen: dict[str, str] = {}
    try:
        phantom = a_radiograph()
        assert send(site, authority, phantom.files[0]) == 0x0000
        wait_until(
            lambda: any(
                row["destination"] == "vault" and "TLS failed" in str(row["reason"])
                for row in deliveries_of(site, study_of(phantom))
            ),
            "the vault was tried",
        )
        wait_until(lambda: len(site.pacs.kept) == 2, "the other destination has its results")
        process_list(running, seen)
        for words in (
            ("check",),
            ("check", "--json"),
            ("doctor",),
            *(("ledger", verb) for verb in ("jobs", "deliveries", "events")),
            ("ledger", "why", study_of(phantom)),
            ("audit",),
        ):
            ran = command(site, *words)
            seen[" ".join(words)] = ran.stdout + ran.stderr
        for path in site.folder.rglob("*"):
            if path.is_file() and path.suffix != ".lock":
                seen[path.name] = path.read_bytes().decode("latin-1")
        good = site.config.read_text()
        site.config.write_text(good.replace("{variable: DOOR_PASSWORD}", BY_MISTAKE))
        running.process.send_signal(signal.SIGHUP)
        wait_until(lambda: is_refused(running, seen), "the config with a secret in it is refused")
        seen["check of it"] = command(site, "check").stdout
        assert "private_key_password" in seen["check of it"]
        for face in ("metrics", "readyz", "livez"):
            seen[face] = site.http(face)[1]
        seen["log"] = site.log.read_text()
        seen["trail"] = (site.folder / "audit/audit.log").read_text("utf-8")
    finally:
        running.stop()
    seen["collector"] = b"\n".join(collector.wait_for(1)).decode("latin-1")
    assert all(seen.values()), [name for name, text in seen.items() if not text]
    assert [name for name, text in seen.items() if "QUAGGA" in text] == []


def is_refused(running: Running, seen: dict[str, str]) -> bool:
    process_list(running, seen)  # the new config is proved by a process of its own
    return any('"config-refused"' in line for line in running.lines)


def send(site: Site, authority: Authority, file: bytes) -> int:
    """The status of one C-STORE over TLS."""
    shown = authority.sign("modality")
    tls = ClientTLS(
        ca=authority.ca,
        certificate=shown.certificate,
        private_key=shown.private_key,
        server_name="door",
    )
    place = Destination(
        type="dimse",
        ae_title="DICOM_XAI",
        host="127.0.0.1",
        port=site.port,
        calling_ae_title="MODALITY",
        tls=tls,
    )
    scu = StorageSCU("service", place)
    try:
        return scu.send(file).status
    finally:
        scu.close()
