"""A big file on its way, looked at by those who pass it on while it is published."""

from __future__ import annotations

import hashlib
import random
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

import pytest

from tests.unit.doubles import pin
from weightferry.cache.layout import CacheLayout
from weightferry.cache.partial import Run
from weightferry.testing.origin import FakeOrigin
from weightferry.transfer.arriving import Arriving

CONTENT = random.Random(0).randbytes(3 << 20)


@pytest.fixture
def arriving(layout: CacheLayout) -> Arriving:
    pinned = pin(FakeOrigin({"m.bin": CONTENT}))
    entry = (pinned, pinned.files[0])
    return Arriving(layout, entry, layout.partial_of(*entry), [], ThreadPoolExecutor(1), lambda _: None)


def finish(arriving: Arriving) -> None:
    """Bring all of it, and wait until it is published."""
    arriving.partial.write(0, CONTENT)
    arriving.note(Run(0, len(CONTENT), zlib.crc32(CONTENT)))
    arriving._pool.shutdown()


class PublishedMeanwhile:
    """A lock that somebody else, who publishes the file, gets first."""

    def __init__(self, arriving: Arriving) -> None:
        self.arriving, self.lock = arriving, Lock()

    def __enter__(self) -> None:
        self.arriving._lock = self.lock
        finish(self.arriving)
        self.lock.acquire()

    def __exit__(self, *_: object) -> None:
        self.lock.release()


@pytest.mark.parametrize("look", ["covers", "missing"])
def test_publishing_does_not_hide_what_is_there(arriving: Arriving, look: str) -> None:
    """Else the neighbour waits for ever for what nobody will announce again."""
    arriving.begin()
    lock: Any = PublishedMeanwhile(arriving)
    arriving._lock = lock
    assert getattr(arriving, look)(0, len(CONTENT)) in (True, [])
    assert not arriving.path.exists(), "no partial data beside the published file"


def test_it_is_there_under_its_final_name(arriving: Arriving, layout: CacheLayout) -> None:
    arriving.begin()
    finish(arriving)
    blob = layout.blob(arriving.pinned, arriving.file)
    assert hashlib.sha256(Path(blob).read_bytes()).digest() == hashlib.sha256(CONTENT).digest()
    assert arriving.covers(0, len(CONTENT))
    assert not arriving.path.exists()
