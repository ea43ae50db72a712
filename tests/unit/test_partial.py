"""Partial data survives its writer. A wrong line in the journal costs only the range that it names."""

from __future__ import annotations

import itertools
import os
import random
import signal
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from weightferry.cache.extents import Extents
from weightferry.cache.partial import PartialFile, WrittenRange, discard, journal_path, verified_ranges

SIZE = 5000
CONTENT = random.Random(0).randbytes(SIZE)


def written(start: int, stop: int) -> WrittenRange:
    return WrittenRange(start, stop, zlib.crc32(CONTENT[start:stop]))


def write(path: Path, *ranges: tuple[int, int]) -> None:
    partial = PartialFile(path, SIZE, "key")
    for start, stop in ranges:
        partial.write(start, CONTENT[start:stop])
        partial.record(written(start, stop))


class TestExtents:
    @pytest.mark.parametrize("seed", range(20))
    def test_extents_are_a_set_of_bytes(self, seed: int) -> None:
        rng = random.Random(seed)
        extents, present = Extents(), set[int]()
        for _ in range(30):
            start = rng.randrange(100)
            stop = start + rng.randrange(15)
            extents.add(start, stop)
            present |= set(range(start, stop))
            assert {byte for a, b in extents for byte in range(a, b)} == present
            assert extents.total == len(present)
            begin, end = sorted(rng.sample(range(120), 2))
            gone = {byte for a, b in extents.missing(begin, end) for byte in range(a, b)}
            assert gone == set(range(begin, end)) - present
            assert extents.cover(begin, end) == (not gone)
            assert extents.within(begin, end) == end - begin - len(gone)
        ranges = list(extents)
        assert all(before[1] < after[0] for before, after in itertools.pairwise(ranges)), "joined, in order"

    def test_empty_ranges(self) -> None:
        assert Extents().cover(3, 3)
        assert Extents().missing(2, 4) == [(2, 4)]
        assert Extents([(2, 2)]) == Extents()


def test_recorded_ranges_are_found_again(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "key"
    write(path, (0, 1000), (3000, 4000))
    runs = verified_ranges(path, SIZE, "key")
    assert runs == [written(0, 1000), written(3000, 4000)]
    again = PartialFile(path, SIZE, "key", runs)
    assert list(again.present) == [(0, 1000), (3000, 4000)]
    assert again.missing(0, SIZE) == [(1000, 3000), (4000, SIZE)]
    assert b"".join(map(bytes, again.read(3000, 4000))) == CONTENT[3000:4000]
    assert path.stat().st_size == SIZE


def test_written_data_that_is_not_recorded_is_not_found(tmp_path: Path) -> None:
    PartialFile(tmp_path / "key", SIZE, "key").write(0, CONTENT)
    assert verified_ranges(tmp_path / "key", SIZE, "key") == []


def test_data_survives_a_killed_writer(tmp_path: Path) -> None:
    path = tmp_path / "key"
    code = (
        "import os, pathlib, signal, sys, zlib\n"
        "from weightferry.cache.partial import PartialFile, WrittenRange\n"
        "partial = PartialFile(pathlib.Path(sys.argv[1]), 5000, 'key')\n"
        "partial.write(7, b'abc')\n"
        "partial.record(WrittenRange(7, 10, zlib.crc32(b'abc')))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert [(found.start, found.stop) for found in verified_ranges(path, SIZE, "key")] == [(7, 10)]


@pytest.mark.parametrize("flipped", [0, 999, 3000])
def test_a_damaged_range_costs_only_that_range(tmp_path: Path, flipped: int) -> None:
    path = tmp_path / "key"
    write(path, (0, 1000), (3000, 4000))
    with path.open("r+b") as file:
        file.seek(flipped)
        file.write(bytes([CONTENT[flipped] ^ 1]))
    assert verified_ranges(path, SIZE, "key") == [written(3000, 4000) if flipped < 1000 else written(0, 1000)]


@pytest.mark.parametrize(
    "line",
    ["", "nonsense", "0 1000", "-5 10 00000000", "10 5 00000000", "4000 6000 00000000", "0 x 0", "\0\xff", "1 2 3 4"],
)
def test_a_wrong_journal_line_costs_only_its_range(tmp_path: Path, line: str) -> None:
    path = tmp_path / "key"
    write(path, (0, 1000))
    with journal_path(path).open("a") as journal:
        journal.write(line)  # incomplete: no newline
    assert verified_ranges(path, SIZE, "key") == [written(0, 1000)]
    again = PartialFile(path, SIZE, "key", verified_ranges(path, SIZE, "key"))
    again.write(1000, CONTENT[1000:2000])
    again.record(written(1000, 2000))
    assert verified_ranges(path, SIZE, "key") == [written(0, 1000), written(1000, 2000)]


@pytest.mark.parametrize(("size", "content"), [(SIZE, "other"), (SIZE + 1, "key"), (None, "key")])
def test_data_of_another_content_is_not_used(tmp_path: Path, size: int | None, content: str) -> None:
    write(tmp_path / "key", (0, 1000))
    assert verified_ranges(tmp_path / "key", size, content) == []


def test_data_that_is_shorter_than_its_journal_says(tmp_path: Path) -> None:
    write(tmp_path / "key", (0, 1000), (3000, 4000))
    os.truncate(tmp_path / "key", 3500)
    assert verified_ranges(tmp_path / "key", SIZE, "key") == [written(0, 1000)]


def test_space_is_reserved_before_the_first_byte(tmp_path: Path) -> None:
    PartialFile(tmp_path / "key", 1 << 20, "key")
    assert (tmp_path / "key").stat().st_blocks * 512 >= 1 << 20


def test_a_full_disk_names_the_needed_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"No space left on device \(5000 bytes are needed\)"):
        PartialFile(tmp_path / "key", SIZE, "key")


def test_discard(tmp_path: Path) -> None:
    write(tmp_path / "key", (0, 10))
    discard(tmp_path / "key")
    discard(tmp_path / "key")
    assert list(tmp_path.iterdir()) == []
