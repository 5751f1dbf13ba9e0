"""Each thing that runs out refuses by its name, and takes again when there is more of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from dicom_xai.errors import OutOfResourcesError
from dicom_xai.ledger import Ledger
from dicom_xai.service.pressure import Limits, Pressure, Scarce, free_memory_bytes
from tests.make.ledger import a_job, a_result, an_instance, receive, url_in, wanted

GENEROUS = Limits(max_spool_bytes=None, max_waiting=1000, min_free_memory_bytes=0)


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    opened = Ledger(url_in(tmp_path))
    yield opened
    opened.close()


def machine(folder: Path, free_kb: int, **group: int | str) -> Path:
    """A root with just what tells how much memory is free."""
    (folder / "proc").mkdir(parents=True, exist_ok=True)
    (folder / "proc/meminfo").write_text(f"MemTotal: 9 kB\nMemAvailable:   {free_kb} kB\n")
    (folder / "sys/fs/cgroup").mkdir(parents=True, exist_ok=True)
    for name, value in group.items():
        text = f"anon 1\ninactive_file {value}\n" if name == "stat" else f"{value}\n"
        (folder / f"sys/fs/cgroup/memory.{name}").write_text(text)
    return folder


def reason(pressure: Pressure) -> str:
    """Why an object would be refused now; empty when it would not."""
    try:
        pressure.check()
    except OutOfResourcesError as error:
        return error.reason
    return ""


@pytest.mark.promise("D5")
def test_a_full_quota_refuses_at_once_and_takes_again_when_files_are_gone(ledger: Ledger) -> None:
    pressure = Pressure(ledger, replace(GENEROUS, max_spool_bytes=250))
    for number in (1, 2):
        receive(ledger, an_instance(number))  # 100 bytes each
    assert pressure.look() == (set(), set())
    assert reason(pressure) == ""
    pressure.stored(100)  # before anybody measures again
    assert reason(pressure) == "spool-quota"
    assert pressure.look() == ({Scarce.SPOOL}, set())
    pressure.sum_again()  # what was counted was not kept
    assert pressure.look() == (set(), {Scarce.SPOOL})
    assert reason(pressure) == ""


def test_the_quota_counts_what_an_earlier_process_left(ledger: Ledger) -> None:
    for number in (1, 2):
        receive(ledger, an_instance(number))
    pressure = Pressure(ledger, replace(GENEROUS, max_spool_bytes=200))
    assert pressure.look() == ({Scarce.SPOOL}, set())
    pressure.use(replace(GENEROUS, max_spool_bytes=201))
    assert pressure.look() == (set(), {Scarce.SPOOL})


def test_a_full_queue_refuses_until_a_job_is_done(ledger: Ledger) -> None:
    pressure = Pressure(ledger, replace(GENEROUS, max_waiting=2))
    one = an_instance(1, series=1)
    receive(ledger, one, wanted(one))  # a unit that waits for more
    assert pressure.look() == (set(), set())
    job = a_job(ledger, 2)
    assert pressure.look() == ({Scarce.QUEUE}, set())
    assert reason(pressure) == "queue-full"
    assert ledger.jobs.finish(job, [a_result(job)])
    assert pressure.look() == (set(), {Scarce.QUEUE})
    assert reason(pressure) == ""


def test_little_memory_refuses_until_there_is_more(ledger: Ledger, tmp_path: Path) -> None:
    limits = replace(GENEROUS, min_free_memory_bytes=1024 * 1000)
    pressure = Pressure(ledger, limits, machine(tmp_path, free_kb=999))
    assert pressure.look() == ({Scarce.MEMORY}, set())
    assert reason(pressure) == "memory"
    machine(tmp_path, free_kb=1000)
    assert pressure.look() == (set(), {Scarce.MEMORY})
    assert reason(pressure) == ""


@pytest.mark.parametrize(
    ("group", "free"),
    [
        ({}, 1024 * 5000),  # no control group
        ({"max": "max", "current": 10, "stat": 0}, 1024 * 5000),
        ({"max": 10_000, "current": 9_000, "stat": 0}, 1_000),
        ({"max": 10_000, "current": 9_000, "stat": 500}, 1_500),  # file pages are given back
        ({"max": 10**12, "current": 0, "stat": 0}, 1024 * 5000),  # the machine has less
    ],
)
def test_free_memory_is_the_machines_or_the_containers(
    tmp_path: Path, group: dict[str, int | str], free: int
) -> None:
    assert free_memory_bytes(machine(tmp_path, 5000, **group)) == free


def test_free_memory_of_this_machine_can_be_read() -> None:
    assert free_memory_bytes() > 0
