"""One destination stuck or dead: what do the others notice? Ready to triaged, small radiographs."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from rich.table import Table

from dicom_xai.demo.site import Site
from tests.bench.timing import percentile
from tests.bench.triage import wait_for_triage
from tests.make.models import write_models
from tests.make.scripted_peer import Lie, ScriptedPeer
from tests.make.studies import a_radiograph, study_of

STUDIES = 30
#: Calling AE title, and who gets the result besides the PACS that is measured.
CASES = {"ALONE": "", "STALLED": "stalled", "DEAD": "dead", "REFUSING": "refusing"}
_ROUTE = """
  - name: {name}
    when: {{calling_ae_title: {{equals: {calling}}}}}
    trigger: instance
    model: phantom-cxr
    explain: [grad-cam]
    send: [{{object: sc, to: [{to}]}}]
    budget_s: 30
"""


def run(folder: Path) -> Table:
    """Percentiles for each kind of neighbour, interleaved in one run."""
    table = Table(title=f"Triage beside another destination, {STUDIES} studies each, ms")
    for heading in ("neighbour", "p50", "p95", "max"):
        table.add_column(heading, justify="left" if heading == "neighbour" else "right")
    routes = "routes:" + "".join(
        _ROUTE.format(
            name=calling.lower(), calling=calling, to=", ".join(filter(None, [other, "pacs"]))
        )
        for calling, other in CASES.items()
    )
    spent: dict[str, list[float]] = {calling: [] for calling in CASES}
    with ExitStack() as stack:
        stalled, dead, refusing = (stack.enter_context(ScriptedPeer()) for _ in range(3))
        stalled.tell(*[Lie.NO_ANSWER] * 1000)
        refusing.answer(*[0xA700] * 10_000)
        dead.stop()
        peers = {"stalled": stalled, "dead": dead, "refusing": refusing}
        site = Site(
            folder / "site",
            models=write_models(folder / "models"),
            routes=routes,
            destinations={n: f"PEER@127.0.0.1:{peer.port}" for n, peer in peers.items()},
        )
        with site:
            for _ in range(STUDIES):
                for calling in CASES:
                    phantom = a_radiograph()
                    site.send(phantom.files, calling=calling)
                    triaged = wait_for_triage(site, study_of(phantom))
                    spent[calling].append(triaged.seconds["triage"])
    for calling, values in spent.items():
        cells = [percentile(values, p) * 1e3 for p in (50, 95, 100)]
        table.add_row(calling.lower(), *(f"{cell:.0f}" for cell in cells))
    return table
