"""config/dicom-xai.yaml, `audit`: who did what, to a file and to a collector."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from dicom_xai.config.tls import ClientTLS
from dicom_xai.config.types import Bool, Section


class SyslogConfig(Section):
    """A collector: syslog over TLS (RFC 5424, RFC 5425; PS3.15 A.6)."""

    host: str = Field(min_length=1, description="Its address.")
    port: int = Field(6514, ge=1, le=65535, description="Its port.")
    tls: ClientTLS = Field(description="There is no syslog without it.")


class AuditConfig(Section):
    """The audit trail (PS3.15 A.5)."""

    directory: Path | None = Field(None, description="Its folder; default: `audit` by the ledger.")
    rotate_bytes: int = Field(
        50_000_000, ge=10_000, description="A larger file is set aside, never deleted."
    )
    rotate_days: float = Field(7.0, gt=0, description="An older file is set aside.")
    source_id: str | None = Field(
        None, min_length=1, description="AuditSourceID; default: the host's name."
    )
    site_id: str | None = Field(None, min_length=1, description="AuditEnterpriseSiteID.")
    include_patient_id: Bool = Field(
        False,
        description="Name the patient by Patient ID in messages about instances, as PS3.15 A.5.3 "
        "wants; without it the Study Instance UID alone leads to the patient.",
    )
    syslog: SyslogConfig | None = Field(None, description="A collector beside the file.")
