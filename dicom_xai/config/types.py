"""The types of single values: what a YAML scalar, read as text, may become."""

from __future__ import annotations

import difflib
import ipaddress
import re
from collections.abc import Sequence
from typing import Annotated

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
)
from pydicom.datadict import keyword_dict


def nearest(word: str, known: Sequence[str]) -> str:
    """A `; did you mean X?` for a misspelt word, or nothing."""
    lowered = {item.lower(): item for item in known}
    close = difflib.get_close_matches(word.lower(), list(lowered), n=1, cutoff=0.6)
    return f"; did you mean {lowered[close[0]]!r}?" if close else ""


def _ae_title(text: str) -> str:
    """An AE value (PS3.5 6.2): 1 to 16 printable ASCII characters, no backslash."""
    if not 1 <= len(text) <= 16 or not text.strip():
        raise ValueError(f"an AE title has 1 to 16 characters, found {len(text)}")
    if any(not 0x20 <= ord(c) <= 0x7E or c == "\\" for c in text):
        raise ValueError("an AE title is printable ASCII without backslash")
    return text.strip()


def _network(text: str) -> str:
    return str(ipaddress.ip_network(text, strict=True))


def _name(text: str) -> str:
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,62}", text):
        raise ValueError("a name is lower-case letters, digits, '.', '_' and '-', at most 63 long")
    return text


def _yes_or_no(value: object) -> object:
    """YAML 1.2's two booleans; `yes`, `NO` and `on` are words."""
    if isinstance(value, str):
        if value not in ("true", "false"):
            raise ValueError("write true or false")
        return value == "true"
    return value


def _keyword(text: str) -> str:
    if text not in keyword_dict and text not in SENDER_FACTS:
        near = nearest(text, [*keyword_dict, *SENDER_FACTS])
        raise ValueError(f"{text!r} is no DICOM keyword and no sender fact{near}")
    return text


#: What a clause may ask about beside DICOM keywords.
SENDER_FACTS = ("calling_ae_title", "called_ae_title", "source_address")

AETitle = Annotated[str, AfterValidator(_ae_title)]
Keyword = Annotated[str, AfterValidator(_keyword)]
Network = Annotated[str, AfterValidator(_network)]
Name = Annotated[str, AfterValidator(_name)]
Port = Annotated[int, Field(ge=0, le=65535)]
Bool = Annotated[bool, BeforeValidator(_yes_or_no)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Section(BaseModel):
    """What all sections share: frozen, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
