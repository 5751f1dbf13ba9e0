"""config/dicom-xai.yaml: doors, disks, devices, destinations."""

from __future__ import annotations

import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    Field,
    ValidationError,
    model_validator,
)

from dicom_xai.config.audit import AuditConfig
from dicom_xai.config.tls import ClientTLS, ListenerTLS
from dicom_xai.config.types import (
    AETitle,
    Bool,
    Name,
    Network,
    Port,
    Seconds,
    Section,
)
from dicom_xai.errors import ConfigError


class Listener(Section):
    """One AE title on one port."""

    ae_title: AETitle = Field(description="Our AE title on this port; any other is rejected.")
    host: str = Field("127.0.0.1", description="Address to bind.")
    port: Port = Field(description="TCP port; 0 takes a free one (tests).")
    tls: ListenerTLS | None = Field(None, description="TLS on this port; plain without it.")


class Allowed(Section):
    """Who may send."""

    ae_title: AETitle = Field(description="Calling AE title; `*` for any.")
    network: Network = Field(description="Source network, for example 10.1.2.0/24.")
    called_ae_title: AETitle = Field("*", description="Our AE title that it may call; `*` any.")


class Requester(Section):
    """Where somebody who asks us for storage commitment takes our report."""

    host: str = Field(min_length=1, description="Its address.")
    port: int = Field(ge=1, le=65535, description="Its port.")
    tls: ClientTLS | None = Field(None, description="TLS towards it; plain without it.")


class IgnoredKind(StrEnum):
    """Kinds of object that are kept but never routed."""

    SR = "SR"
    PR = "PR"
    KO = "KO"
    SEG = "SEG"
    DOC = "DOC"


class ReceiveConfig(Section):
    """The door for images."""

    listeners: tuple[Listener, ...] = Field(min_length=1, description="Where we listen.")
    allow: tuple[Allowed, ...] = Field(min_length=1, description="Who may send; nobody else may.")
    max_associations: int = Field(100, ge=1, le=10_000, description="At most so many at once.")
    max_waiting: int = Field(
        20_000, ge=1, description="With so many units and jobs undone, C-STORE gets 0xA700."
    )
    min_free_memory_bytes: int = Field(
        256_000_000,
        ge=0,
        description="The same, when machine or container has less memory free.",
    )
    max_per_source: int = Field(20, ge=1, le=10_000, description="The same, for one address.")
    accept_and_ignore: tuple[IgnoredKind, ...] = Field(
        tuple(IgnoredKind), description="Kinds answered with Success and never routed."
    )
    commitment: dict[AETitle, Requester] = Field(
        {},
        description="By AE title: where to report storage commitment when its association is over.",
    )
    acse_timeout_s: Seconds = Field(5.0, gt=0, description="For each step of association set-up.")
    dimse_timeout_s: Seconds = Field(30.0, gt=0, description="Between messages of one operation.")
    network_timeout_s: Seconds = Field(60.0, gt=0, description="An idle association is aborted.")

    @model_validator(mode="after")
    def _one_listener_for_each_title(self) -> ReceiveConfig:
        """Listeners may share a port; then the called AE title tells them apart."""
        taken: set[tuple[str, int, str]] = set()
        doors: dict[tuple[str, int], ListenerTLS | None] = {}
        for listener in self.listeners:
            door = (listener.host, listener.port)
            if listener.port and doors.setdefault(door, listener.tls) != listener.tls:
                raise ValueError(
                    f"listeners on {listener.host}:{listener.port} differ in `tls`: one port, one"
                )
            key = (listener.host, listener.port, listener.ae_title)
            if listener.port and key in taken:
                raise ValueError(
                    f"two listeners are {listener.ae_title} on {listener.host}:{listener.port}"
                )
            taken.add(key)
        return self


class SpoolConfig(Section):
    """Where bytes are kept."""

    directory: Path = Field(description="A folder on a local disk.")
    min_free_bytes: int = Field(
        2_000_000_000,
        ge=0,
        description="Below it C-STORE gets 0xA700; results of work in hand may use half of it.",
    )
    max_bytes: int | None = Field(
        None,
        ge=1,
        description="Bytes that images and results may take; at it C-STORE gets 0xA700.",
    )
    keep_days: float = Field(2.0, ge=0, description="Delivered studies stay so long.")
    keep_failed_days: float = Field(
        30.0, ge=0, description="Failed and held units stay so long, for somebody to look at them."
    )

    @model_validator(mode="after")
    def _failed_units_stay_longer(self) -> SpoolConfig:
        if self.keep_failed_days < self.keep_days:
            raise ValueError(
                f"keep_failed_days is {self.keep_failed_days:g}, wanted keep_days "
                f"({self.keep_days:g}) or more"
            )
        return self


def _ledger_url(text: str) -> str:
    if not re.fullmatch(r"sqlite:///[^?#]+", text):
        found = text.partition(":")[0]  # no more of it: a URL may hold a password
        raise ValueError(f"found {found}, wanted sqlite:///PATH; other engines are not served")
    return text


class LedgerConfig(Section):
    """Where facts are kept."""

    url: Annotated[str, AfterValidator(_ledger_url)] = Field(
        description="SQLAlchemy URL, for example sqlite:///../var/ledger.db"
    )


class ModelsConfig(Section):
    """Where the model cards are."""

    directory: Path = Field(description="A folder of NAME.yaml files with their .onnx beside them.")


class Compression(StrEnum):
    """How objects are compressed for a destination."""

    NONE = "none"
    RLE = "rle"
    JPEG = "jpeg"  #: lossy, SC only; SEG goes uncompressed


class Destination(Section):
    """Where results go."""

    type: Literal["dimse"] = Field(description="dimse: C-STORE to a storage SCP.")
    ae_title: AETitle = Field(description="The destination's AE title.")
    host: str = Field(min_length=1, description="Its address.")
    port: int = Field(ge=1, le=65535, description="Its port.")
    compress: Compression = Field(Compression.NONE, description="none | rle | jpeg (SC only).")
    calling_ae_title: AETitle = Field("DICOM_XAI", description="Our AE title towards it.")
    keep_open_s: Seconds = Field(
        3.0, gt=0, description="An association without work is released after so long."
    )
    tls: ClientTLS | None = Field(None, description="TLS towards it; plain without it.")
    commitment: Bool = Field(
        False,
        description="Ask it for storage commitment; it reports to our `calling_ae_title`.",
    )
    commitment_wait_s: Seconds = Field(
        60.0,
        gt=0,
        description="Ask again without a report after so long; twice as long each time, up to 1 h.",
    )


class TelemetryConfig(Section):
    """The HTTP face: /metrics, /livez, /readyz."""

    host: str = Field("127.0.0.1", description="Address to bind.")
    port: Port = Field(
        9464, description="Port; a role started alone uses port, +1, +2 (receiver, worker, sender)."
    )


def _device(text: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda:\d{1,2}", text):
        raise ValueError("a device is auto, cpu or cuda:N")
    return text


class DecodeConfig(Section):
    """Decoding, in processes that may die."""

    processes: int = Field(
        0, ge=0, le=64, description="For each worker; 0 takes one for each core, at most 4."
    )
    memory_bytes: int = Field(
        2_000_000_000,
        ge=1,
        description="What images decoded ahead of their job may take, for each worker.",
    )
    limit_bytes: int = Field(
        2_147_483_648, ge=1, description="Largest object, decoded to 4 bytes a pixel."
    )
    unit_bytes: int = Field(
        4_000_000_000,
        ge=1,
        description="What all images of one unit may take, decoded; a larger unit is refused.",
    )
    timeout_s: Seconds = Field(
        30.0, gt=0, le=3600, description="Longest time for one object; then it is given up."
    )


class WorkConfig(Section):
    """The workers."""

    hang_s: Seconds = Field(
        120.0,
        gt=0,
        le=3600,
        description="A job that has not come on for so long ends its worker, and is tried again.",
    )


class ServiceConfig(Section):
    """config/dicom-xai.yaml"""

    receive: ReceiveConfig
    spool: SpoolConfig
    ledger: LedgerConfig
    models: ModelsConfig
    devices: tuple[Annotated[str, AfterValidator(_device)], ...] = Field(
        ("auto",), min_length=1, description="auto | cpu | cuda:N; one worker each."
    )
    decode: DecodeConfig = DecodeConfig()
    work: WorkConfig = WorkConfig()
    routes: Path = Field(description="The routes file.")
    destinations: dict[Name, Destination] = Field(description="By name.")
    telemetry: TelemetryConfig = TelemetryConfig()
    audit: AuditConfig = AuditConfig()

    @model_validator(mode="after")
    def _reports_can_come_in(self) -> ServiceConfig:
        """A destination that commits reports on an association of its own, most often."""
        titles = {listener.ae_title for listener in self.receive.listeners}
        for name, destination in self.destinations.items():
            ours, theirs = destination.calling_ae_title, destination.ae_title
            if not destination.commitment:
                continue
            if ours not in titles:
                raise ValueError(
                    f"destinations.{name} has `commitment` and calls from {ours}, which is no "
                    "listener's ae_title: its reports could not come in"
                )
            if not any(
                rule.ae_title in ("*", theirs) and rule.called_ae_title in ("*", ours)
                for rule in self.receive.allow
            ):
                raise ValueError(
                    f"destinations.{name} has `commitment`, and receive.allow does not let "
                    f"{theirs} call {ours}: its reports could not come in"
                )
        return self


def parse_address(
    text: str, calling_ae_title: str | None = None, tls: ClientTLS | None = None
) -> Destination:
    """A destination from ``AE@HOST:PORT``, for commands.

    Parameters
    ----------
    text : str
    calling_ae_title : str, optional
        Ours; a destination's default where it is None.
    tls : ClientTLS, optional
        Plain without it.

    Raises
    ------
    ConfigError
        It is written otherwise.
    """
    ae_title, _, rest = text.partition("@")
    host, _, port = rest.rpartition(":")
    values = {"type": "dimse", "ae_title": ae_title, "host": host, "port": port, "tls": tls}
    if calling_ae_title is not None:
        values["calling_ae_title"] = calling_ae_title
    try:
        return Destination.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"found {text!r}, wanted AE@HOST:PORT") from error
