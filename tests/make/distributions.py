"""What the service is made of: the distributions that it needs at run time, and their licences."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.metadata import Distribution, distribution

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = "dicom-xai"

#: Whose terms a hospital or vendor can meet by keeping the notices (SPDX names).
ALLOWED = frozenset(
    """
    0BSD Apache-2.0 BSD-2-Clause BSD-3-Clause HPND ISC MIT MIT-CMU MPL-2.0 PSF-2.0 Unlicense Zlib
    CC0-1.0 BSL-1.0 libtiff IJG
    """.split()
)

#: Copyleft libraries inside wheels, as files of their own that a user may replace, and their terms.
COPYLEFT_INSIDE = {
    "libgomp": "GPL-3.0-or-later WITH GCC-exception-3.1",
    "libgfortran": "GPL-3.0-or-later WITH GCC-exception-3.1",
    "libquadmath": "LGPL-2.1-or-later",
}

#: Metadata that names no SPDX expression: the words found, and what they mean. Read by a person.
_WORDS = {
    "apache 2.0": "Apache-2.0",
    "apache software license": "Apache-2.0",
    "apache license 2.0": "Apache-2.0",
    "apache license, version 2.0": "Apache-2.0",
    "apache": "Apache-2.0",
    "apache license v2.0": "Apache-2.0",
    "bsd": "BSD-3-Clause",
    "bsd license": "BSD-3-Clause",
    "bsd-like": "BSD-3-Clause",
    "3-clause bsd license": "BSD-3-Clause",
    "mit license": "MIT",
    "isc license": "ISC",
    "isc license (iscl)": "ISC",
    "mozilla public license 2.0 (mpl 2.0)": "MPL-2.0",
    "python software foundation license": "PSF-2.0",
    "the unlicense (unlicense)": "Unlicense",
}


def runtime(*extras: str) -> dict[str, Distribution]:
    """All distributions that the root with these extras needs here, by canonical name, itself too.

    Raises
    ------
    PackageNotFoundError
        One is not installed.
    """
    found: dict[str, Distribution] = {}
    waiting = [(ROOT, frozenset(extras))]
    done: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        asked = waiting.pop()
        if asked in done:
            continue
        done.add(asked)
        name, wanted = asked
        dist = found.setdefault(name, distribution(name))
        for requirement in _needs(dist, wanted):
            waiting.append((canonicalize_name(requirement.name), frozenset(requirement.extras)))
    return found


def licence_of(dist: Distribution) -> str:
    """Its licence as an SPDX expression, or its own words where nobody has read them yet."""
    expression = dist.metadata.get("License-Expression")
    if expression:
        return str(expression)
    classified = [
        line.rpartition(" :: ")[2]
        for line in dist.metadata.get_all("Classifier") or []
        if line.startswith("License ::") and not line.endswith("OSI Approved")
    ]
    words = classified or [str(dist.metadata.get("License") or "").split("\n")[0]]
    meant = [_WORDS.get(word.lower(), word) for word in words]
    return " AND ".join(dict.fromkeys(meant)) or "unknown"


def licences_in(expression: str) -> list[set[str]]:
    """The choices of an expression: one set of licences for each side of an OR that may be taken.

    Enough for what metadata holds: parentheses only around one OR, no nesting.
    """
    parts = re.split(r"\s+AND\s+", expression.replace("(", " ").replace(")", " "))
    choices: list[set[str]] = [set()]
    for part in parts:
        options = [re.split(r"\s+WITH\s+", word.strip())[0] for word in part.split(" OR ")]
        choices = [{*choice, option} for choice in choices for option in options]
    return choices


def _needs(dist: Distribution, extras: frozenset[str]) -> Iterator[Requirement]:
    for line in dist.requires or ():
        requirement = Requirement(line)
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in (*extras, "")):
            yield requirement
