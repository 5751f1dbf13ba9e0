"""Real services on loopback: a study goes in by C-STORE, results come out at a real SCP.

One site serves all tests that neither kill nor reconfigure; its routes are told apart by the
calling AE title, so that a test picks a behaviour by the name it sends under.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage
from pynetdicom import AE, evt

from dicom_xai.demo.pacs import StandInPACS
from dicom_xai.demo.site import Site, free_ports
from tests.make.models import write_models

ONE_THREAD = {"OMP_NUM_THREADS": "1"}

ROUTES = """
routes:
  - name: chest
    when:
      Modality: {in: [CR, DX]}
      BodyPartExamined: {equals: CHEST}
      called_ae_title: {equals: DICOM_XAI}
      calling_ae_title: {equals: MODALITY}
    trigger: instance
    model: phantom-cxr
    explain: [grad-cam]
    send: [{object: sc, to: [pacs]}, {object: seg, to: [pacs]}]
    budget_s: 30
  - name: chest-stat
    when:
      Modality: {in: [CR, DX]}
      called_ae_title: {equals: DICOM_XAI_STAT}
    trigger: instance
    model: phantom-cxr
    explain: [grad-cam]
    send: [{object: sc, to: [pacs]}, {object: seg, to: [pacs]}]
    priority: stat
    budget_s: 30
  - name: head
    when:
      Modality: {equals: CT}
      calling_ae_title: {equals: MODALITY}
    trigger: association_release
    quiet_s: 0.5
    model: phantom-ct-head
    explain: [grad-cam]
    findings: 1
    send: [{object: sc, to: [pacs], slices: 3}, {object: seg, to: [pacs]}]
    budget_s: 30
  - name: head-hold
    when:
      Modality: {equals: CT}
      calling_ae_title: {equals: HOLD}
    trigger: association_release
    quiet_s: 0.5
    max_wait_s: 1
    when_incomplete: hold
    model: phantom-ct-head
    explain: [grad-cam]
    send: [{object: sc, to: [pacs]}]
    budget_s: 30
  - name: blind
    when: {calling_ae_title: {equals: BLIND}}
    trigger: instance
    model: blind-cxr
    explain: [grad-cam]
    send: [{object: sc, to: [pacs]}, {object: seg, to: [pacs]}]
    budget_s: 30
  - name: silent
    when: {calling_ae_title: {equals: SILENT}}
    trigger: instance
    model: phantom-cxr
    explain: [grad-cam]
    send: [{object: sc, to: [pacs]}]
    on_failure: silent
    budget_s: 30
  - name: two-destinations
    when: {calling_ae_title: {equals: TWO}}
    trigger: instance
    model: phantom-cxr
    explain: [grad-cam]
    send: [{object: sc, to: [flaky, pacs]}]
    budget_s: 30
  - name: one-flaky
    when: {calling_ae_title: {equals: FLAKY}}
    trigger: instance
    model: phantom-cxr
    explain: [grad-cam]
    send: [{object: sc, to: [flaky]}]
    budget_s: 1.5
  - name: refusing
    when: {calling_ae_title: {equals: NARROW}}
    trigger: instance
    model: phantom-cxr
    explain: [grad-cam]
    send: [{object: sc, to: [narrow]}, {object: seg, to: [narrow]}]
    budget_s: 30
"""


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of untrained models."""
    return write_models(tmp_path_factory.mktemp("models"))


class NarrowPACS:
    """A storage SCP that agrees to Secondary Capture only, and refuses every UID it holds."""

    def __init__(self) -> None:
        (self.port,) = free_ports(1)
        self.kept: list[str] = []
        self.resent = 0
        self._ae = AE(ae_title="NARROW")
        self._ae.add_supported_context(SecondaryCaptureImageStorage, ExplicitVRLittleEndian)

    def start(self) -> None:
        handlers = [(evt.EVT_C_STORE, self._store)]
        self._ae.start_server(("127.0.0.1", self.port), block=False, evt_handlers=handlers)

    def stop(self) -> None:
        self._ae.shutdown()

    def _store(self, event: evt.Event) -> int:
        uid = str(event.request.AffectedSOPInstanceUID)
        if uid in self.kept:
            self.resent += 1
            return 0x0111
        self.kept.append(uid)
        return 0x0000


@dataclass(frozen=True, slots=True)
class Hospital:
    """The shared site, its destinations besides `site.pacs`, and who may send to it."""

    site: Site
    flaky: StandInPACS
    narrow: NarrowPACS


@pytest.fixture(scope="session")
def hospital(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hospital]:
    folder = tmp_path_factory.mktemp("hospital")
    with StandInPACS(folder / "flaky", "FLAKY") as flaky:
        narrow = NarrowPACS()
        narrow.start()
        site = Site(
            folder / "site",
            routes=ROUTES,
            models=models,
            destinations={
                "flaky": f"FLAKY@127.0.0.1:{flaky.port}",
                "narrow": f"NARROW@127.0.0.1:{narrow.port}",
            },
            environment=ONE_THREAD,
        )
        try:
            yield Hospital(site.start(), flaky, narrow)
        finally:
            site.stop()
            narrow.stop()


@pytest.fixture
def site(hospital: Hospital) -> Site:
    """The shared site; nothing of it may be stopped or changed."""
    return hospital.site


@pytest.fixture
def new_site(models: Path, tmp_path: Path) -> Iterator[Callable[..., Site]]:
    """Make sites that a test may kill and change; what still runs is stopped in the end."""
    made: list[Site] = []

    def make(**options: object) -> Site:
        folder = tmp_path / f"site{len(made)}"
        chosen = {"models": models, "routes": ROUTES_TO_PACS, "environment": ONE_THREAD, **options}
        made.append(Site(folder, **chosen))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for each in made:
        each.stop()


#: Only what needs the one destination that every site has.
ROUTES_TO_PACS = ROUTES.partition("  - name: two-destinations")[0]


@pytest.fixture(scope="module")
def models_of_its_own(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Site]:
    """Make a site whose model cards a test may edit: they lie beside it."""
    folder = tmp_path_factory.mktemp("own")
    shutil.copytree(models, folder / "models")
    return lambda: Site(folder / "site", models=folder / "models", routes=ROUTES_TO_PACS)
