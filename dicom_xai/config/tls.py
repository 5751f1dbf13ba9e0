"""Certificates, keys and secrets: where they are, never what they are.

A secret's value is read where it is used and kept nowhere in the config, so that no dump, digest or
error of a config can hold one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from pydantic import Field, model_validator

from dicom_xai.config.types import AETitle, Bool, Section
from dicom_xai.errors import ConfigError
from dicom_xai.tls import check_private

#: The name of an environment variable.
_VARIABLE = r"^[A-Za-z_][A-Za-z0-9_]*$"


class Secret(Section):
    """Where a secret is: in a file of its own, or in the environment."""

    file: Path | None = Field(None, description="A file that holds it and nothing else.")
    variable: str | None = Field(None, pattern=_VARIABLE, description="An environment variable.")

    @model_validator(mode="before")
    @classmethod
    def _no_value(cls, written: object) -> object:
        """Ask before any error could show what was found: it may be the secret itself."""
        if isinstance(written, Secret):
            return written
        is_place = isinstance(written, Mapping) and written.keys() <= {"file", "variable"}
        variable = written.get("variable") if isinstance(written, Mapping) else None
        is_name = isinstance(variable, str) and re.fullmatch(_VARIABLE, variable) is not None
        if not is_place or not (variable is None or is_name):
            raise ValueError(
                "found something else, not shown here, wanted {file: PATH} or {variable: NAME}; "
                "a secret itself stands in no config"
            )
        return written

    @model_validator(mode="after")
    def _one_place(self) -> Secret:
        if (self.file is None) == (self.variable is None):
            raise ValueError("a secret is in a `file` or in a `variable`, in one of the two")
        return self

    def read(self) -> str:
        """The secret itself, without the newline that editors add.

        Raises
        ------
        ConfigError
            It is not there, or its file may be read by everybody.
        """
        if self.variable is not None:
            value = os.environ.get(self.variable)
            if value is None:
                raise ConfigError(f"environment variable {self.variable} is not set; set it")
            return value
        assert self.file is not None
        check_private(self.file)
        try:
            return self.file.read_text("utf-8").rstrip("\r\n")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"secret {self.file}: cannot be read as text") from error


class ListenerTLS(Section):
    """TLS 1.2 or 1.3 on a listener (BCP 195, PS3.15 B.12); without it the port speaks plain."""

    is_server: ClassVar[bool] = True

    certificate: Path = Field(description="PEM: our certificate, then its chain.")
    private_key: Path = Field(description="PEM; not readable by everybody.")
    private_key_password: Secret | None = Field(None, description="Of an encrypted key.")
    ca: Path | None = Field(None, description="PEM: who signs the senders' certificates.")
    crl: Path | None = Field(None, description="PEM: the CA's revocation list, checked if given.")
    require_client_certificate: Bool = Field(
        True, description="false lets in who shows none: encryption without authentication."
    )
    ae_titles_by_certificate: dict[str, tuple[AETitle, ...]] = Field(
        {},
        description="Name in a client's certificate (DNS name, or common name) to the calling AE "
        "titles that it may use; when given, a certificate that is not named here may use none.",
    )

    def key_password(self) -> str:
        """Of an encrypted key, else empty; errors as `Secret.read`."""
        return "" if self.private_key_password is None else self.private_key_password.read()

    @property
    def verifies_peer(self) -> bool:
        """Whether a peer without a certificate of the `ca` is refused."""
        return self.require_client_certificate

    def allows(self, names: tuple[str, ...], ae_title: str) -> bool:
        """Whether a certificate with these names may be used under this calling AE title."""
        if not self.ae_titles_by_certificate:
            return True
        return any(ae_title in self.ae_titles_by_certificate.get(name, ()) for name in names)

    @model_validator(mode="after")
    def _names_need_certificates(self) -> ListenerTLS:
        if self.require_client_certificate and self.ca is None:
            raise ValueError(
                "`ca` is missing: it says whose certificates are taken; or write "
                "`require_client_certificate: false`"
            )
        if self.ae_titles_by_certificate and not self.require_client_certificate:
            raise ValueError(
                "`ae_titles_by_certificate` proves nothing without "
                "`require_client_certificate: true`"
            )
        return self


class ClientTLS(Section):
    """TLS 1.2 or 1.3 towards a server whose certificate and name are always verified."""

    is_server: ClassVar[bool] = False

    ca: Path = Field(description="PEM: who signs the server's certificate.")
    crl: Path | None = Field(None, description="PEM: the CA's revocation list, checked if given.")
    server_name: str | None = Field(
        None, description="The name in its certificate, where that is not `host`."
    )
    certificate: Path | None = Field(None, description="PEM: ours, where the server asks for one.")
    private_key: Path | None = Field(None, description="PEM; not readable by everybody.")
    private_key_password: Secret | None = Field(None, description="Of an encrypted key.")

    def key_password(self) -> str:
        """Of an encrypted key, else empty; errors as `Secret.read`."""
        return "" if self.private_key_password is None else self.private_key_password.read()

    @property
    def verifies_peer(self) -> bool:
        """Always."""
        return True

    @model_validator(mode="after")
    def _key_and_certificate(self) -> ClientTLS:
        if (self.certificate is None) != (self.private_key is None):
            raise ValueError("`certificate` and `private_key` go together")
        return self
