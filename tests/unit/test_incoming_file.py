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
from weightferry.cache.partial import WrittenRange
from weightferry.testing.origin import FakeOrigin
from weightferry.transfer.incoming_file import IncomingFile

CONTENT = random.Random(0).randbytes(3 << 20)


@pytest.fixture
def incoming(layout: CacheLayout) -> IncomingFile:
    pinned = pin(FakeOrigin({"m.bin": CONTENT}))
    entry = (pinned, pinned.files[0])
    return IncomingFile(layout, entry, layout.partial_of(*entry), [], ThreadPoolExecutor(1), lambda _: None)


def finish(incoming: IncomingFile) -> None:
    """Bring all of it, and wait until it is published."""
    incoming.partial.write(0, CONTENT)
    incoming.record(WrittenRange(0, len(CONTENT), zlib.crc32(CONTENT)))
    incoming._pool.shutdown()


class PublishedMeanwhile:
    """A lock that somebody else, who publishes the file, gets first."""

    def __init__(self, incoming: IncomingFile) -> None:
        self.incoming, self.lock = incoming, Lock()

    def __enter__(self) -> None:
        self.incoming._lock = self.lock
        finish(self.incoming)
        self.lock.acquire()

    def __exit__(self, *_: object) -> None:
        self.lock.release()


@pytest.mark.parametrize("look", ["covers", "missing"])
def test_publishing_does_not_hide_what_is_there(incoming: IncomingFile, look: str) -> None:
    """Else the neighbour waits for ever for what nobody will announce again."""
    incoming.begin()
    lock: Any = PublishedMeanwhile(incoming)
    incoming._lock = lock
    assert getattr(incoming, look)(0, len(CONTENT)) in (True, [])
    assert not incoming.path.exists(), "no partial data beside the published file"


def test_it_is_there_under_its_final_name(incoming: IncomingFile, layout: CacheLayout) -> None:
    incoming.begin()
    finish(incoming)
    blob = layout.blob(incoming.pinned, incoming.file)
    assert hashlib.sha256(Path(blob).read_bytes()).digest() == hashlib.sha256(CONTENT).digest()
    assert incoming.covers(0, len(CONTENT))
    assert not incoming.path.exists()
