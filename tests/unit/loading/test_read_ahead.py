"""Files on a network file system are read ahead once per node if memory allows; local files are not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from weightferry.loading import read_ahead as ahead
from weightferry.loading.read_ahead import is_cached, read_ahead

SIZE = 40 << 20


@pytest.fixture
def cold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a file that counts as not in the page cache.

    No file stays out of the page cache while a test looks: the question itself makes the kernel read (Linux 6.18).
    """
    path = tmp_path / "weights"
    path.write_bytes(os.urandom(SIZE))
    monkeypatch.setattr(ahead, "is_cached", lambda _: False)
    return path


@pytest.fixture
def _remote(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "is_local", lambda _: False)


def nothing() -> None:
    pass


def test_local_files_are_left_to_the_kernel(cold: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "is_local", lambda _: True)
    assert read_ahead([cold], 0, 1, nothing) == 0


@pytest.mark.usefixtures("_remote")
def test_the_ranks_of_a_node_read_it_once_together(cold: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = [ahead._read_share(cold, local_rank, 3, nothing) for local_rank in range(3)]
    assert sum(read) == SIZE
    assert max(read) - min(read) <= 1
    monkeypatch.setattr(ahead, "is_cached", is_cached)
    assert read_ahead([cold], 0, 3, nothing) == 0, "the file is already in the page cache"


@pytest.mark.usefixtures("_remote")
def test_files_larger_than_the_memory_are_not_read(cold: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "available_memory", lambda: SIZE)
    assert read_ahead([cold], 0, 1, nothing) == 0
    monkeypatch.setattr(ahead, "available_memory", lambda: 3 * SIZE)
    assert read_ahead([cold, cold], 0, 1, nothing) == SIZE


def test_the_target_of_a_link_decides(cold: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = tmp_path / "local/link"
    link.parent.mkdir()
    link.symlink_to(cold)
    monkeypatch.setattr(ahead, "is_local", lambda folder: folder == link.parent)
    assert read_ahead([link], 0, 1, nothing) == SIZE


@pytest.mark.usefixtures("_remote")
def test_an_exception_of_check_ends_the_reading(cold: Path) -> None:
    class Over(Exception):
        pass

    def over() -> None:
        raise Over

    with pytest.raises(Over):
        read_ahead([cold], 0, 1, over)


def test_available_memory_is_reported() -> None:
    assert ahead.available_memory() > 1 << 20
