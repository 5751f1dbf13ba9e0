"""Objects are prepared in processes that may die, within bounds, the urgent ones first."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from dicom_xai.decode.pixels import decode
from dicom_xai.errors import DecodeError, StudyError, TransientError
from dicom_xai.prepare import Prepared
from dicom_xai.service.ahead import Ahead
from dicom_xai.study import Instance, Job, Per, Priority, Purpose, Sender, Unit
from tests.make.books import wait_until
from tests.make.studies import a_head, changed

TIMEOUT_S = 30.0
ROOMY = 10**9


def a_slice() -> bytes:
    return a_head(2).files[0]


def an_instance(name: str) -> Instance:
    return Instance(name, "", "", "", "", name, "0" * 64, 0, Sender("", "", ""))


def take(ahead: Ahead, job_id: int, instances: list[Instance], **job: object) -> list[Prepared]:
    """What a job waits for."""
    return ahead.take(a_job(job_id, instances, **job), meanwhile=lambda: None)


def a_job(job_id: int, instances: list[Instance], priority: Priority = Priority.ROUTINE) -> Job:
    return Job(
        job_id=job_id,
        token=1,
        unit=Unit(Per.SERIES, "1.2", "1.3"),
        route="",
        route_json="",
        model="",
        model_digest="",
        purpose=Purpose.TRIAGE,
        generation=0,
        priority=priority,
        ready_at=0.0,
        deadline_at=0.0,
        created_at="",
        explainer="",
        attempts=1,
        instances=tuple(instances),
    )


class Clock:
    """Stands still until a test moves it."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class Files:
    """Stored files by name; `before` runs each time that one is opened."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.opened: list[str] = []
        self.before: Callable[[], None] = lambda: None
        self.deaths: list[str] = []

    def add(self, name: str, data: bytes) -> Instance:
        (self._folder / name).write_bytes(data)
        return an_instance(name)

    def open(self, instance: Instance) -> int:
        self.opened.append(instance.spool_key)
        self.before()
        try:
            return os.open(self._folder / instance.spool_key, os.O_RDONLY)
        except FileNotFoundError as error:
            raise StudyError("gone from the spool") from error


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def ahead(files: Files, clock: Clock, request: pytest.FixtureRequest) -> Iterator[Ahead]:
    asked = getattr(request, "param", {})
    made = Ahead(
        files.open,
        processes=asked.get("processes", 1),
        memory_bytes=asked.get("memory_bytes", ROOMY),
        limit_bytes=asked.get("limit_bytes", 2**28),
        unit_bytes=asked.get("unit_bytes", ROOMY),
        timeout_s=asked.get("timeout_s", TIMEOUT_S),
        on_death=lambda _instance, reason: files.deaths.append(reason),
        most_entries=asked.get("most_entries", 100),
        clock=clock,
    )
    made.start()
    yield made
    made.stop()


def held_at_the_next(files: Files) -> tuple[threading.Event, threading.Event]:
    """Whether the next file to be opened is waited for, and what lets it go."""
    is_held, gate = threading.Event(), threading.Event()

    def hold() -> None:
        files.before = lambda: None
        is_held.set()
        assert gate.wait(TIMEOUT_S)

    files.before = hold
    return is_held, gate


def prepare_ahead(ahead: Ahead, files: Files, count: int) -> None:
    """Routine slices, one after the other, until all are prepared."""
    data = a_slice()
    for number in range(count):
        before = ahead.held_bytes
        ahead.expect(files.add(f"early-{number}", data), Priority.ROUTINE)
        wait_until(lambda before=before: ahead.held_bytes > before, "it is prepared")


def assert_open(gate: threading.Event) -> None:
    assert gate.wait(TIMEOUT_S)


def children() -> list[psutil.Process]:
    return [
        child for child in psutil.Process().children() if "decoder" in " ".join(child.cmdline())
    ]


def test_what_comes_back_equals_decoding_here(ahead: Ahead, files: Files) -> None:
    slices = a_head(3).files
    instances = [files.add(f"slice-{i}", data) for i, data in enumerate(slices)]
    prepared = take(ahead, 1, instances)
    for data, made in zip(slices, prepared, strict=True):
        here = decode(data)
        np.testing.assert_array_equal(made.decoded.stored, here.stored)
        assert made.decoded.header == here.header
        assert made.decoded.modality == here.modality


def test_an_object_is_prepared_once_however_often_it_is_wanted(ahead: Ahead, files: Files) -> None:
    instance = files.add("slice", a_slice())
    ahead.expect(instance, Priority.ROUTINE)
    take(ahead, 1, [instance])
    take(ahead, 2, [instance])
    assert files.opened == ["slice"]


def test_what_the_last_job_releases_is_forgotten(ahead: Ahead, files: Files) -> None:
    instance = files.add("slice", a_slice())
    take(ahead, 1, [instance])
    take(ahead, 2, [instance])
    ahead.release(1)
    assert ahead.held_bytes > 0
    ahead.release(2)
    assert ahead.held_bytes == 0


def test_a_file_that_cannot_be_decoded_says_why(ahead: Ahead, files: Files) -> None:
    instance = files.add("odd", changed(a_slice(), BitsStored=99))
    with pytest.raises(DecodeError, match="BitsStored: 99"):
        take(ahead, 1, [instance])


def test_a_file_that_is_gone_fails_its_study_only(ahead: Ahead, files: Files) -> None:
    with pytest.raises(StudyError, match="gone from the spool"):
        take(ahead, 1, [an_instance("gone")])
    assert take(ahead, 2, [files.add("slice", a_slice())])


def test_a_process_that_dies_once_is_replaced_and_the_object_tried_again(
    ahead: Ahead, files: Files
) -> None:
    take(ahead, 1, [files.add("first", a_slice())])
    [victim] = children()

    def kill_it() -> None:
        files.before = lambda: None
        victim.send_signal(signal.SIGSEGV)

    files.before = kill_it
    assert take(ahead, 2, [files.add("second", a_slice())])
    assert files.deaths == [f"was ended by signal {signal.SIGSEGV.value}"]


@pytest.mark.promise("P6")
def test_an_object_that_kills_its_process_twice_is_given_up_alone(
    ahead: Ahead, files: Files
) -> None:
    take(ahead, 1, [files.add("first", a_slice())])

    def kill_it() -> None:
        for child in children():
            child.kill()

    files.before = kill_it
    with pytest.raises(DecodeError, match="signal 9, 2 times"):
        take(ahead, 2, [files.add("bad", a_slice())])
    files.before = lambda: None
    assert take(ahead, 9, [files.add("good", a_slice())])


@pytest.mark.parametrize("ahead", [{"timeout_s": 3.0}], indirect=True)
def test_a_process_that_hangs_is_killed_after_its_time(ahead: Ahead, files: Files) -> None:
    take(ahead, 1, [files.add("first", a_slice())])

    def stop_it() -> None:
        files.before = lambda: None
        for child in children():
            child.suspend()

    files.before = stop_it
    assert take(ahead, 2, [files.add("second", a_slice())])
    assert files.deaths == ["did not answer in time"]


@pytest.mark.parametrize("ahead", [{"memory_bytes": 1}], indirect=True)
def test_beyond_the_memory_bound_only_claimed_work_goes_on(ahead: Ahead, files: Files) -> None:
    data = a_head(3).files
    first, second, third = (files.add(f"slice-{i}", item) for i, item in enumerate(data))
    take(ahead, 1, [first])  # fills the bound
    ahead.expect(second, Priority.ROUTINE)
    take(ahead, 2, [third])
    assert files.opened == ["slice-0", "slice-2"]
    ahead.release(1)
    ahead.release(2)
    take(ahead, 3, [second])
    assert files.opened == ["slice-0", "slice-2", "slice-1"]


@pytest.mark.parametrize("ahead", [{"most_entries": 2}], indirect=True)
def test_what_nobody_asked_for_in_time_makes_place_for_new_arrivals(
    ahead: Ahead, files: Files, clock: Clock
) -> None:
    prepare_ahead(ahead, files, 2)
    ahead.expect(files.add("refused", a_slice()), Priority.ROUTINE)
    clock.now_s += 1e6
    ahead.expect(files.add("later", a_slice()), Priority.ROUTINE)
    wait_until(lambda: "later" in files.opened, "the later one is prepared")
    assert files.opened == ["early-0", "early-1", "later"]


@pytest.mark.parametrize("ahead", [{"most_entries": 2}], indirect=True)
def test_a_stat_arrival_takes_the_place_of_what_was_prepared_for_a_routine_one(
    ahead: Ahead, files: Files
) -> None:
    prepare_ahead(ahead, files, 2)
    ahead.expect(files.add("stat", a_slice()), Priority.STAT)
    wait_until(lambda: "stat" in files.opened, "it is prepared")
    early = take(ahead, 1, [an_instance("early-1")])
    assert early
    assert files.opened == ["early-0", "early-1", "stat"]  # the oldest one made place


@pytest.mark.parametrize("ahead", [{"memory_bytes": 1}], indirect=True)
def test_a_stat_arrival_takes_the_memory_of_what_was_prepared_for_a_routine_one(
    ahead: Ahead, files: Files
) -> None:
    prepare_ahead(ahead, files, 1)
    ahead.expect(files.add("stat", a_slice()), Priority.STAT)
    wait_until(lambda: "stat" in files.opened, "it is prepared")


@pytest.mark.parametrize("ahead", [{"most_entries": 2}], indirect=True)
def test_a_stat_arrival_takes_the_place_of_a_routine_one_that_waits(
    ahead: Ahead, files: Files
) -> None:
    routine = [files.add(f"routine-{number}", a_slice()) for number in range(3)]
    is_held, gate = held_at_the_next(files)
    for instance in routine:
        ahead.expect(instance, Priority.ROUTINE)
    assert is_held.wait(TIMEOUT_S)
    ahead.expect(files.add("stat", a_slice()), Priority.STAT)
    gate.set()
    wait_until(lambda: "stat" in files.opened, "it is prepared")
    assert take(ahead, 1, routine[2:])  # no job misses what made place
    assert files.opened[:2] == ["routine-0", "stat"]


@pytest.mark.parametrize("ahead", [{"memory_bytes": 1}], indirect=True)
def test_a_routine_job_waits_for_no_stat_arrival_that_finds_no_memory(
    ahead: Ahead, files: Files
) -> None:
    take(ahead, 1, [files.add("held", a_slice())])
    arrivals = [files.add(f"stat-{number}", a_slice()) for number in range(2)]
    for instance in arrivals:
        ahead.expect(instance, Priority.STAT)
    assert take(ahead, 2, arrivals[1:])
    assert files.opened == ["held", "stat-1"]


def test_what_is_given_up_while_it_is_prepared_is_not_held(ahead: Ahead, files: Files) -> None:
    instances = [
        files.add("odd", changed(a_slice(), BitsStored=99)),
        files.add("slice", a_slice()),
    ]
    gate = threading.Event()

    def hold_the_next() -> None:
        files.before = lambda: assert_open(gate)

    files.before = hold_the_next
    with pytest.raises(DecodeError, match="BitsStored: 99"):
        take(ahead, 1, instances)
    ahead.release(1)
    gate.set()
    take(ahead, 2, [files.add("another", a_slice())])
    ahead.release(2)
    assert ahead.held_bytes == 0


@pytest.mark.promise("C3")
@pytest.mark.parametrize("ahead", [{"limit_bytes": 2**16}], indirect=True)
def test_an_object_beyond_the_limit_is_refused_by_arithmetic(ahead: Ahead, files: Files) -> None:
    with pytest.raises(DecodeError, match="the limit is 65536"):
        take(ahead, 1, [files.add("large", changed(a_slice(), Rows=256, Columns=65535))])


@pytest.mark.promise("C3")
@pytest.mark.parametrize("ahead", [{"unit_bytes": 115_000}], indirect=True)
def test_a_unit_beyond_its_limit_is_refused_while_it_is_prepared(
    ahead: Ahead, files: Files
) -> None:
    # each takes 39 kB, or 56 kB where a mask tells its padding: the third slice is one too many
    slices = [files.add(f"slice-{i}", data) for i, data in enumerate(a_head(9).files)]
    named = r"^series:1\.2:1\.3: 3 of 9 images take 1\d{5} bytes decoded; .* 115000, .*unit_bytes"
    with pytest.raises(StudyError, match=named):
        take(ahead, 1, slices)
    assert ahead.held_bytes == 0
    assert files.opened == ["slice-0", "slice-1", "slice-2"]
    assert take(ahead, 2, slices[:2])


@pytest.mark.promise("C3")
@pytest.mark.parametrize("ahead", [{"unit_bytes": 1}], indirect=True)
def test_what_was_prepared_ahead_counts_towards_a_units_limit(ahead: Ahead, files: Files) -> None:
    prepare_ahead(ahead, files, 1)
    with pytest.raises(StudyError, match="1 of 2 images take"):
        take(ahead, 1, [an_instance("early-0"), an_instance("gone")])
    assert "gone" not in files.opened


def test_the_processes_end_with_their_asker(ahead: Ahead, files: Files) -> None:
    take(ahead, 1, [files.add("slice", a_slice())])
    assert children()
    ahead.stop()
    assert not children()


def test_stat_goes_first_and_what_a_job_waits_for_before_what_is_only_expected(
    ahead: Ahead, files: Files
) -> None:
    names = ("first", "expected", "expected-stat", "claimed", "claimed-stat")
    instances = {name: files.add(name, a_slice()) for name in names}
    is_held, gate = held_at_the_next(files)
    ahead.expect(instances["first"], Priority.ROUTINE)
    assert is_held.wait(TIMEOUT_S)
    ahead.expect(instances["expected"], Priority.ROUTINE)
    ahead.expect(instances["expected-stat"], Priority.STAT)
    asked = threading.Barrier(3)

    def job(number: int, name: str, priority: Priority) -> None:
        # what is called meanwhile is called once the job's wish is known
        def meanwhile() -> None:
            if not gate.is_set():
                asked.wait(TIMEOUT_S)

        ahead.take(a_job(number, [instances[name]], priority), meanwhile)

    jobs = [
        threading.Thread(target=job, args=(1, "claimed", Priority.ROUTINE)),
        threading.Thread(target=job, args=(2, "claimed-stat", Priority.STAT)),
    ]
    for thread in jobs:
        thread.start()
    asked.wait(TIMEOUT_S)
    gate.set()
    for thread in jobs:
        thread.join(TIMEOUT_S)
    take(ahead, 3, [instances["expected"]])
    assert files.opened == ["first", "claimed-stat", "expected-stat", "claimed", "expected"]


def test_a_job_that_waits_when_the_worker_stops_is_retried(ahead: Ahead, files: Files) -> None:
    files.before = threading.Thread(target=ahead.stop).start
    with pytest.raises(TransientError, match="stops"):
        take(ahead, 1, [files.add("slice", a_slice())])


def test_trouble_of_our_own_is_not_taken_for_a_bad_file(ahead: Ahead, files: Files) -> None:
    def fail() -> None:
        raise OSError("no more descriptors")

    files.before = fail
    with pytest.raises(TransientError, match="stops"):
        take(ahead, 1, [files.add("slice", a_slice())])
    assert isinstance(ahead.broken_by, OSError)
