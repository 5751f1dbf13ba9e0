"""The software bill of materials of the running service: `make sbom` (CycloneDX 1.6, JSON).

cyclonedx-py lists everything that is installed; kept is what the service needs at run time, with
the files' hashes where the lock has them. ``python -m tests.make.sbom LISTED OUT``.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from packaging.utils import canonicalize_name

from tests.make.distributions import ROOT, runtime

REPOSITORY = Path(__file__).parents[2]
_PIN = re.compile(
    r"^([A-Za-z0-9._-]+)==(\S+) \\\n((?: +--hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)", re.M
)


def hashes(lock: Path) -> dict[tuple[str, str], list[str]]:
    """SHA-256 of every file of each pinned release, by canonical name and version."""
    return {
        (canonicalize_name(name), version): re.findall(r"sha256:([0-9a-f]{64})", listed)
        for name, version, listed in _PIN.findall(lock.read_text("utf-8"))
    }


def reduced(bom: dict[str, Any], locked: dict[tuple[str, str], list[str]]) -> dict[str, Any]:
    """The bill without what tests and tools alone need.

    A release has several files (one for each platform); each is an external reference of kind
    `distribution` with its hash, since which one was installed is not recorded.
    """
    needed = runtime("cpu").keys()
    components = [
        item for item in bom["components"] if canonicalize_name(item["name"]) in needed - {ROOT}
    ]
    for item in components:
        found = locked.get((canonicalize_name(item["name"]), item["version"]), [])
        place = f"https://pypi.org/project/{item['name']}/{item['version']}/#files"
        item["externalReferences"] = [
            *item.get("externalReferences", ()),
            *(
                {
                    "type": "distribution",
                    "url": place,
                    "comment": "one of the release's files",
                    "hashes": [{"alg": "SHA-256", "content": digest}],
                }
                for digest in found
            ),
        ]
    references = {item["bom-ref"] for item in components}
    references.add(bom["metadata"]["component"]["bom-ref"])
    edges = [
        {**edge, "dependsOn": [ref for ref in edge.get("dependsOn", ()) if ref in references]}
        for edge in bom["dependencies"]
        if edge["ref"] in references
    ]
    return {**bom, "components": components, "dependencies": edges}


if __name__ == "__main__":
    listed, out = Path(sys.argv[1]), Path(sys.argv[2])
    bill = reduced(
        json.loads(listed.read_text("utf-8")), hashes(REPOSITORY / "requirements-cpu.lock")
    )
    out.write_text(json.dumps(bill, indent=1) + "\n", "utf-8")
    print(f"{out}: {len(bill['components'])} components")
