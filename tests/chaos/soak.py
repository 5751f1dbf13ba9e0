"""``make soak``: half an hour of ordinary work; memory, threads, files and latency must stay flat.

``python -m tests.chaos.soak --minutes 30``. Prints a line for each tenth of the time: what the
service's processes hold, and how long studies of that tenth took from ready to accepted. A person
reads it; only a study that is lost or stuck fails.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from dicom_xai.demo.phantom import CHEST_FINDINGS, Phantom, chest, head_ct
from dicom_xai.demo.site import ROUTINE, STAT, Site
from tests.bench.series import renamed
from tests.bench.timing import percentile
from tests.bench.triage import wait_for_triage
from tests.make.studies import header_of

ROWS = 10
PAUSE_S = 0.5
DECODER = "dicom_xai.service.decoder"
ROLES = ("receiver", "worker", "sender")


def main() -> None:
    """Send one study after the other until the time is over."""
    parser = argparse.ArgumentParser(prog="make soak")
    parser.add_argument("--minutes", type=float, default=30.0)
    minutes = parser.parse_args().minutes
    table = Table(title=f"{minutes:g} minutes of studies, one after the other")
    for heading in ("min", "studies", "p50 ms", "p95 ms", "max ms"):
        table.add_column(heading, justify="right")
    for kin in (*ROLES, "decoders"):
        table.add_column(f"{kin}\nMB threads files", justify="right")
    for name in ("ledger MB", "spool MB"):
        table.add_column(name, justify="right")
    rng = np.random.default_rng(7)
    examples = [
        *(chest(rng, findings={name}, matrix=(512, 512)) for name in CHEST_FINDINGS[:3]),
        head_ct(rng, slices=24, matrix=256, haemorrhage=True),
    ]
    with tempfile.TemporaryDirectory(prefix="soak-") as folder, _site(Path(folder)) as site:
        started = time.monotonic()
        turn = itertools.count()
        for row in range(1, ROWS + 1):
            latencies: list[float] = []
            while time.monotonic() - started < 60 * minutes * row / ROWS:
                latencies.append(_one_study(site, examples, next(turn)))
                time.sleep(PAUSE_S)
            ms = [f"{1e3 * percentile(latencies, p):.0f}" for p in (50, 95, 100)]
            sizes = (_size_mb(site.folder / name) for name in ("ledger.db", "spool"))
            held = _held(site)
            table.add_row(
                f"{minutes * row / ROWS:g}",
                *(str(len(latencies)), *ms),
                *(held[kin] for kin in (*ROLES, "decoders")),
                *(f"{size:.1f}" for size in sizes),
            )
    Console(width=140, highlight=False).print(table)


def _site(folder: Path) -> Site:
    """Its spool keeps three minutes, so that cleaning up is a part of it."""
    lines = [
        f"  directory: {folder / 'spool'}",
        *("  min_free_bytes: 100000000", "  keep_days: 0.002", "  keep_failed_days: 0.002"),
    ]
    return Site(folder, settings={"spool": "\n".join(lines)})


def _size_mb(path: Path) -> float:
    """Of a file, or of all files below a folder; files come and go while one looks."""
    total = 0
    for each in [path, *path.rglob("*")]:
        with suppress(FileNotFoundError):
            total += each.stat().st_size
    return total / 1e6


def _one_study(site: Site, examples: list[Phantom], turn: int) -> float:
    """Seconds from ready to accepted."""
    files = renamed(examples[turn % len(examples)].files)
    statuses = site.send(files, STAT if turn % 7 == 0 else ROUTINE)
    assert set(statuses) == {0}, f"study {turn} was answered {Counter(statuses)}"
    return wait_for_triage(site, str(header_of(files[0]).StudyInstanceUID)).seconds["triage"]


def _held(site: Site) -> dict[str, str]:
    """Resident memory, threads and open files of each role, and of all decoders together."""
    totals: dict[str, Counter[str]] = {}
    for process in psutil.Process(site.pid).children(recursive=True):
        words = process.cmdline()
        kin = "decoders" if DECODER in words else next(r for r in ROLES if r in words)
        with process.oneshot():
            totals.setdefault(kin, Counter()).update(
                MB=process.memory_info().rss >> 20,
                threads=process.num_threads(),
                files=process.num_fds(),
            )
    return {
        kin: f"{total['MB']} {total['threads']:>3} {total['files']:>3}"
        for kin, total in totals.items()
    }


if __name__ == "__main__":
    main()
