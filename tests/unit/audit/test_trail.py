"""The append-only file: durable, private, chained, shared by processes, set aside in time."""

from __future__ import annotations

import json
import multiprocessing
import stat
from pathlib import Path

import pytest

from dicom_xai.audit.trail import ACTIVE, Follower, Record, Trail, newest, rotated, verify


def a_trail(folder: Path, clock: list[float] | None = None, rotate_bytes: int = 10**9) -> Trail:
    now = clock or [1_700_000_000.0]
    return Trail(folder, rotate_bytes, 7.0, lambda: now[0])


def write(trail: Trail, *texts: str) -> list[Record]:
    return [trail.append(lambda at, text=text: text) for text in texts]  # type: ignore[misc]


def read(folder: Path, after: int = 0) -> list[str]:
    follower = Follower(folder, after)
    found = []
    while (record := follower.next()) is not None:
        found.append(record.message)
    follower.close()
    return found


@pytest.mark.promise("K6")
def test_messages_are_numbered_and_chained(tmp_path: Path) -> None:
    one, two = write(a_trail(tmp_path), "<a/>", "<b/>")
    assert (one.number, two.number) == (1, 2)
    assert two.follows(one.chain)
    assert not two.follows("0" * 64)
    assert read(tmp_path) == ["<a/>", "<b/>"]
    assert verify(tmp_path).problems == ()


@pytest.mark.promise("K6")
@pytest.mark.parametrize("how", ["changed", "removed", "put in", "swapped", "dated otherwise"])
def test_a_trail_that_was_touched_shows_it(tmp_path: Path, how: str) -> None:
    write(a_trail(tmp_path), *(f"<m{i}/>" for i in range(5)))
    path = tmp_path / ACTIVE
    lines = path.read_bytes().splitlines(keepends=True)
    if how == "changed":
        lines[2] = lines[2].replace(b"<m2/>", b"<m9/>")
    elif how == "removed":
        del lines[2]
    elif how == "put in":
        lines.insert(2, lines[2])
    elif how == "swapped":
        lines[2], lines[3] = lines[3], lines[2]
    else:
        lines[2] = lines[2].replace(b"2023-", b"2024-")
    path.write_bytes(b"".join(lines))
    assert verify(tmp_path).problems


def test_folder_and_files_are_the_owners_alone(tmp_path: Path) -> None:
    write(a_trail(tmp_path / "audit"), "<a/>")
    assert stat.S_IMODE((tmp_path / "audit").stat().st_mode) == 0o700
    for path in (tmp_path / "audit").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path.name


def _write_many(folder: Path, name: str) -> None:
    write(a_trail(folder, rotate_bytes=5_000), *(f"<m by='{name}{i}'/>" for i in range(40)))


@pytest.mark.promise("K6")
def test_processes_share_a_trail_without_losing_or_mixing(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_write_many, args=(tmp_path, name)) for name in "abc"]
    for each in writers:
        each.start()
    for each in writers:
        each.join()
    found = read(tmp_path)
    assert len(found) == len(set(found)) == 120
    assert (verify(tmp_path).last, verify(tmp_path).problems) == (120, ())
    assert rotated(tmp_path)


@pytest.mark.parametrize("torn", [b'{"n": 3, "at": "2023', b"\x00" * 30])
def test_a_line_that_a_power_cut_left_torn_is_passed_over_and_told(
    tmp_path: Path, torn: bytes
) -> None:
    trail = a_trail(tmp_path)
    write(trail, "<a/>", "<b/>")
    with (tmp_path / ACTIVE).open("ab") as file:
        file.write(torn)
    (third,) = write(trail, "<c/>")
    assert third.number == 3
    assert read(tmp_path) == ["<a/>", "<b/>", "<c/>"]
    (problem,) = verify(tmp_path).problems
    assert problem.startswith("audit.log:3: not a message")


@pytest.mark.promise("K6")
@pytest.mark.parametrize("size", [15_900, 16_000, 200_000, 3_000_000])
@pytest.mark.parametrize("torn", [b"", b"\x00" * 300_000], ids=["whole", "torn"])
def test_a_long_message_is_followed_like_any(tmp_path: Path, size: int, torn: bytes) -> None:
    trail = a_trail(tmp_path)
    long = "é" * (size // 2)
    write(trail, "<a/>", long)
    with (tmp_path / ACTIVE).open("ab") as file:
        file.write(torn)
    assert [record.number for record in write(trail, "<c/>", "<d/>")] == [3, 4]
    assert read(tmp_path, after=1) == [long, "<c/>", "<d/>"]
    assert len(verify(tmp_path).problems) == bool(torn)


@pytest.mark.promise("K6")
def test_a_large_file_is_set_aside_and_the_chain_goes_on(tmp_path: Path) -> None:
    trail = a_trail(tmp_path, rotate_bytes=600)
    write(trail, *(f"<m{i}/>" for i in range(12)))
    names = [path.name for _, path in rotated(tmp_path)]
    assert len(names) >= 2
    assert names == sorted(names)
    assert read(tmp_path) == [f"<m{i}/>" for i in range(12)]
    assert read(tmp_path, after=5) == [f"<m{i}/>" for i in range(5, 12)]
    assert verify(tmp_path).problems == ()


def test_an_old_file_is_set_aside(tmp_path: Path) -> None:
    clock = [1_700_000_000.0]
    trail = a_trail(tmp_path, clock)
    write(trail, "<a/>")
    clock[0] += 7 * 86_400 - 1
    write(trail, "<b/>")
    assert rotated(tmp_path) == []
    clock[0] += 1
    write(trail, "<c/>")
    assert [number for number, _ in rotated(tmp_path)] == [2]


def test_a_follower_goes_on_across_a_rotation(tmp_path: Path) -> None:
    clock = [1_700_000_000.0]
    trail = a_trail(tmp_path, clock)
    write(trail, "<a/>")
    follower = Follower(tmp_path, 0)
    first = follower.next()
    assert first is not None
    assert follower.next() is None
    write(trail, "<b/>")
    clock[0] += 8 * 86_400
    write(trail, "<c/>")
    found = [record.message for _ in range(2) if (record := follower.next()) is not None]
    assert found == ["<b/>", "<c/>"]
    assert follower.next() is None
    follower.close()


def test_a_follower_of_an_empty_folder_waits(tmp_path: Path) -> None:
    follower = Follower(tmp_path / "later", 0)
    assert follower.next() is None
    assert newest(tmp_path / "later") is None
    write(a_trail(tmp_path / "later"), "<a/>")
    record = follower.next()
    assert record is not None
    assert record.message == "<a/>"
    follower.close()


def test_files_that_were_moved_away_are_no_fault(tmp_path: Path) -> None:
    write(a_trail(tmp_path, rotate_bytes=600), *(f"<m{i}/>" for i in range(12)))
    rotated(tmp_path)[0][1].unlink()
    verdict = verify(tmp_path)
    assert verdict.first > 1
    assert verdict.problems == ()


def test_a_line_is_json_that_other_tools_read(tmp_path: Path) -> None:
    write(a_trail(tmp_path), '<a b="ü"/>')
    (line,) = (tmp_path / ACTIVE).read_text("utf-8").splitlines()
    assert json.loads(line)["message"] == '<a b="ü"/>'
