"""A whole site on loopback: the service as its own processes, a stand-in PACS, and a sender.

For the demonstration, the flow tests and the benchmarks. All state lives in one folder; ports are
free ones; nothing but what was started here is ever stopped.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from dicom_xai.config import Destination, parse_address
from dicom_xai.deliver.storage_scu import StorageSCU
from dicom_xai.demo.pacs import StandInPACS
from dicom_xai.dimse import Status
from dicom_xai.errors import ConfigError, DestinationUnavailableError
from dicom_xai.ledger import Ledger

START_TIMEOUT_S = 120.0
ROUTINE, STAT = "DICOM_XAI", "DICOM_XAI_STAT"


class Site:
    """A service and its PACS.

    Parameters
    ----------
    folder : Path
        Takes config, spool, ledger and log.
    routes : str, optional
        Text of routes.yaml; the bundled one by default.
    models : Path, optional
        Folder of model cards; the bundled ones by default.
    destinations : mapping of str to str
        Name to ``AE@HOST:PORT``, besides `pacs`.
    settings : mapping of str to str
        Section name to YAML lines that replace that section of dicom-xai.yaml.
    receive : str
        YAML lines added to the receive section.
    environment : mapping of str to str
        Added to the service's environment.
    """

    def __init__(
        self,
        folder: Path,
        *,
        routes: str | None = None,
        models: Path | None = None,
        destinations: dict[str, str] | None = None,
        settings: dict[str, str] | None = None,
        receive: str = "",
        environment: dict[str, str] | None = None,
    ) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.pacs = StandInPACS(folder / "pacs")
        self.port, self.stat_port, self.http_port = free_ports(3)
        self.config = folder / "dicom-xai.yaml"
        self.log = folder / "service.log"
        self._environment = environment or {}
        self._process: subprocess.Popen[bytes] | None = None
        bundled = Path(str(resources.files("dicom_xai"))) / "bundled"
        self._models = (models or bundled / "models").resolve()
        self._routes = routes or (bundled / "routes.yaml").read_text()
        self._destinations = destinations or {}
        self._settings = settings or {}
        self._receive = receive

    def start(self, *, wait: bool = True) -> Site:
        """Start PACS and service; return when the service is ready.

        Raises
        ------
        ConfigError
            The service ended instead of becoming ready; its last log lines are in the message.
        """
        self.pacs.start()
        self.write_config()
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "dicom_xai.cli", "run", "--config", str(self.config)],
                stdout=log,
                stderr=log,
                env={**os.environ, **self._environment},
                process_group=0,
            )
        if wait:
            self.wait_until_ready()
        return self

    def write_config(self) -> None:
        """Write both YAML files; the service reads them at start and on reload."""
        names = {"pacs": f"PACS@127.0.0.1:{self.pacs.port}", **self._destinations}
        destinations = {name: parse_address(text, ROUTINE) for name, text in names.items()}
        sections = {
            "receive": "\n".join(
                [
                    "  listeners:",
                    f"    - {{ae_title: {ROUTINE}, host: 127.0.0.1, port: {self.port}}}",
                    f"    - {{ae_title: {STAT}, host: 127.0.0.1, port: {self.stat_port}}}",
                    '  allow: [{ae_title: "*", network: 127.0.0.0/8}]',
                    *self._receive.splitlines(),
                ]
            ),
            "spool": f"  directory: {self.folder / 'spool'}\n  min_free_bytes: 100000000",
            "ledger": f"  url: sqlite:///{self.folder / 'ledger.db'}",
            "models": f"  directory: {self._models}",
            "telemetry": f"  host: 127.0.0.1\n  port: {self.http_port}",
            "destinations": "\n".join(
                f"  {name}: {{type: dimse, ae_title: {each.ae_title}, host: {each.host}, "
                f"port: {each.port}}}"
                for name, each in destinations.items()
            ),
            **self._settings,
        }
        text = "\n".join(f"{name}:\n{lines}" for name, lines in sections.items())
        self.config.write_text(f"{text}\ndevices: [auto]\nroutes: routes.yaml\n")
        (self.folder / "routes.yaml").write_text(self._routes)

    def wait_until_ready(self) -> None:
        """Return when /readyz says so."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            if self._process is None or self._process.poll() is not None:
                raise ConfigError(f"the service did not start:\n{self._last_lines()}")
            if self.http("readyz")[0] == 200:
                return
            time.sleep(0.05)
        raise ConfigError(f"the service was not ready in time:\n{self._last_lines()}")

    def stop(self) -> None:
        """Stop service and PACS."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(30)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._process = None
        self.pacs.stop()

    def reload(self) -> None:
        """Ask the service to read its config again."""
        if self._process is not None:
            self._process.send_signal(signal.SIGHUP)

    @property
    def pid(self) -> int:
        """The supervisor's process id."""
        if self._process is None:
            raise ConfigError("the service does not run")
        return self._process.pid

    def __enter__(self) -> Site:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def address(self, ae_title: str = ROUTINE, calling: str = "MODALITY") -> Destination:
        """Where to send to."""
        port = self.stat_port if ae_title == STAT else self.port
        return parse_address(f"{ae_title}@127.0.0.1:{port}", calling)

    def send(
        self, files: Sequence[bytes], ae_title: str = ROUTINE, calling: str = "MODALITY"
    ) -> list[int]:
        """Send files over one association and release it; gives the statuses.

        A status of 0xA7xx comes as 0xA700.
        """
        scu = StorageSCU("service", self.address(ae_title, calling))
        statuses = []
        try:
            for file in files:
                try:
                    statuses.append(scu.send(file).status)
                except DestinationUnavailableError:
                    if not scu.is_open:
                        raise
                    statuses.append(int(Status.OUT_OF_RESOURCES))
        finally:
            scu.close()
        return statuses

    def ledger(self) -> Ledger:
        """The service's ledger; the caller closes it."""
        return Ledger(f"sqlite:///{self.folder / 'ledger.db'}")

    def http(self, path: str) -> tuple[int, str]:
        """Status and text of one of the HTTP faces; 0 when nobody answers."""
        url = f"http://127.0.0.1:{self.http_port}/{path}"
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                return int(answer.status), answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError:
            return 0, ""

    def _last_lines(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-12:])


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]
    finally:
        for each in sockets:
            each.close()
