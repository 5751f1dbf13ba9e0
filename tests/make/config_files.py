"""A whole config in a folder, from text that a test may spoil."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

SERVICE = """\
receive:
  listeners:
    - {ae_title: DICOM_XAI, host: 127.0.0.1, port: 11112}
  allow:
    - {ae_title: "*", network: 127.0.0.0/8}
  max_associations: 100
  accept_and_ignore: [SR, PR]
spool: {directory: ../var/spool, min_free_bytes: 2000000000, keep_days: 2}
ledger: {url: "sqlite:///../var/ledger.db"}
models: {directory: models}
devices: [auto]
routes: routes.yaml
destinations:
  pacs: {type: dimse, ae_title: PACS, host: 127.0.0.1, port: 4242}
telemetry: {host: 127.0.0.1, port: 9464}
"""

ROUTES = """\
match: all
routes:
  - name: chest
    when:
      Modality: {in: [CR, DX]}
      BodyPartExamined: {equals: CHEST}
    trigger: instance
    model: phantom-cxr
    explain: [grad-cam]
    send: [{object: sc, to: [pacs]}]
tests:
  - name: a chest is triaged
    attributes: {Modality: DX, BodyPartExamined: CHEST}
    expect: [chest]
"""

MODEL = b"not a model, but bytes that a hash can be taken of"

CARD = f"""\
name: phantom-cxr
version: "1.0"
file: phantom-cxr.onnx
sha256: {hashlib.sha256(MODEL).hexdigest()}
intended_use: demonstration, not for diagnosis
manufacturer: nobody
calibrated: false
inputs:
  - name: image
    kind: image2d
    size: [64, 64]
    windowing: {{source: source}}
outputs:
  - name: logits
    kind: classification
    activation: sigmoid
    classes:
      - name: nodule
        label: Nodule
        threshold: 0.5
        category: {{value: "49755003", scheme: SCT, meaning: Morphologically abnormal structure}}
        type: {{value: "27925004", scheme: SCT, meaning: Nodule}}
heatmap: {{full_scale: 2.0, threshold: 0.5}}
"""

#: Stands in a spoilt text where the problem must be reported.
HERE = "§"


@dataclass
class Folder:
    """The three files; change the texts, then `write`."""

    path: Path
    texts: dict[str, str] = field(
        default_factory=lambda: {
            "dicom-xai.yaml": SERVICE,
            "routes.yaml": ROUTES,
            "models/phantom-cxr.yaml": CARD,
        }
    )

    def spoil(self, name: str, old: str, new: str) -> None:
        """Put `new` in the place of `old`, which must be there."""
        assert old in self.texts[name], f"{old!r} is not in {name}"
        self.texts[name] = self.texts[name].replace(old, new, 1)

    def write(self) -> Path:
        """Write all files without their marks; give the service's file."""
        (self.path / "models").mkdir(parents=True, exist_ok=True)
        for name, text in self.texts.items():
            (self.path / name).write_text(text.replace(HERE, ""), encoding="utf-8")
        (self.path / "models/phantom-cxr.onnx").write_bytes(MODEL)
        return self.path / "dicom-xai.yaml"

    def marks(self) -> list[tuple[str, int, int]]:
        """File name, line and column of every `HERE`."""
        found = []
        for name, text in self.texts.items():
            for number, line in enumerate(text.split("\n"), start=1):
                clean = 0
                for character in line:
                    if character == HERE:
                        found.append((Path(name).name, number, clean + 1))
                    else:
                        clean += 1
        return found
