"""An origin in memory with faults, for tests of code that reads from origins.

In tests::

    origin = FakeOrigin({"model.bin": weights, "config.json": b"{}"})
    origin.faults.append(Fault("model.bin", cut_after=1000))
    resolution = pin_sources(requests, settings, monitor, origin.factory)
    ...  # read model.bin and config.json, with one retry
    assert origin.sent == 1000 + (len(weights) - 1000) + 2
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

from weightferry.errors import BadRequest, SourceChanged, SourceNotFound
from weightferry.hashing import Checksum
from weightferry.manifest import File, PinnedSource, listing_commit
from weightferry.origins.base import (
    RangeIgnored,
    Silent,
    TransientOriginError,
    is_below,
    path_outside_source,
    suggest_similar,
)
from weightferry.settings import Settings
from weightferry.sources import Source


@dataclass
class Fault:
    """One way to fail, for the next matching calls.

    Attributes
    ----------
    path
        Fail only reads of this file; empty: any file.
    on
        The method to fail.
    times
        How many calls to fail; None: all.
    error
        The call raises this error before the first byte.
    cut_after
        The connection breaks after this many bytes of the response: `TransientOriginError`.
    silent_after
        The origin sends no more bytes after this many bytes of the response: `Silent`, without a wait.
    end_after
        The response ends after this many bytes without an error.
    corrupt
        Invert the byte at this offset of the file, if the response contains it.
    extra
        Bytes to append to the response.
    ignore_range
        The response to a read of a range is the whole file: `RangeIgnored`. It counts only reads of a range.
    wait_for
        The response waits until the test sets this event, at most one minute.
    """

    path: str = ""
    on: Literal["read", "resolve", "check_access"] = "read"
    times: int | None = 1
    error: Exception | None = None
    cut_after: int | None = None
    silent_after: int | None = None
    end_after: int | None = None
    corrupt: int | None = None
    extra: bytes = b""
    ignore_range: bool = False
    wait_for: threading.Event | None = None


@dataclass
class Read:
    """One call of `read`: the requested range, and the number of bytes sent so far."""

    path: str
    start: int
    stop: int | None
    sent: int = 0


class FakeOrigin:
    """Implements `weightferry.origins.base.Origin` over a dict. Safe to use from several threads.

    One object serves every source; it ignores the root.

    Parameters
    ----------
    files
        Content by path. A change of the mapping is a change at the origin.
    publishes
        The kind of checksum to publish; None: none. The version of a file is then a hash of its content.
    sizes
        Whether to publish the size of files.
    ranges
        Whether it supports range reads; if not, `File.ranges` is False and a read of a range raises `RangeIgnored`.
    chunk
        Bytes to send at a time.

    Attributes
    ----------
    faults : list of Fault
        A call shows the first matching fault.
    reads : list of Read
        Every call of `read`.
    resolves : list of tuple
        Root and paths of every call of `resolve`.
    access_checks : list of Source
        Every call of `check_access`.
    closed : int
        The number of calls of `close`. The origin works after `close`, since `factory` always returns the same object.
    """

    def __init__(
        self,
        files: Mapping[str, bytes],
        *,
        publishes: Literal["sha256", "git-sha1"] | None = "sha256",
        sizes: bool = True,
        ranges: bool = True,
        chunk: int = 1 << 16,
    ) -> None:
        self.files = dict(files)
        self.faults: list[Fault] = []
        self.reads: list[Read] = []
        self.resolves: list[tuple[str, tuple[str, ...]]] = []
        self.access_checks: list[Source] = []
        self.closed = 0
        self._publishes, self._sizes, self._ranges, self._chunk = publishes, sizes, ranges, chunk
        self._lock = threading.Lock()

    def factory(self, scheme: str, settings: Settings) -> FakeOrigin:
        """Return this origin; replaces `weightferry.origins.base.origin_for`."""
        del scheme, settings
        return self

    @property
    def sent(self) -> int:
        """The bytes sent by all reads."""
        return sum(read.sent for read in self.reads)

    def resolve(self, source: Source, paths: Sequence[str]) -> PinnedSource:
        """See `Origin.resolve`; the commit changes with the content of any file."""
        self.resolves.append((source.root, tuple(paths)))
        fault = self._fault("resolve", "")
        if fault.error:
            raise fault.error
        above, _, name = source.root.rpartition("/")
        if list(paths) == [""] and name in self.files:
            source, paths = replace(source, root=above, path=name), [name]
        found: dict[str, File] = {}
        for path in paths:
            names = [name for name in self.files if is_below(name, path)]
            if not names:
                hint = suggest_similar(path, list(self.files))
                raise SourceNotFound(f"no file or folder {path!r} in the source{hint}", subject=f"{source}/{path}")
            found |= {name: self.file(name, str(source)) for name in names}
        return PinnedSource(
            source, listing_commit(self.file(name, str(source)) for name in self.files), tuple(found.values())
        )

    def file(self, path: str, subject: str = "") -> File:
        """Return the manifest entry of one file."""
        content = self.files[path]
        checksum, version = None, ""
        if self._publishes == "sha256":
            checksum = Checksum("sha256", hashlib.sha256(content).hexdigest())
        elif self._publishes == "git-sha1":
            blob = b"blob %d\0" % len(content) + content
            checksum = Checksum("git-sha1", hashlib.sha1(blob, usedforsecurity=False).hexdigest())
        else:
            version = hashlib.sha256(content).hexdigest()
        try:
            return File(path, len(content) if self._sizes else None, checksum, version, ranges=self._ranges)
        except BadRequest as error:
            raise path_outside_source(path, subject) from error

    @contextmanager
    def read(
        self, pinned: PinnedSource, path: str, start: int = 0, stop: int | None = None
    ) -> Iterator[Iterator[bytes]]:
        """See `Origin.read`."""
        read = Read(path, start, stop)
        self.reads.append(read)
        subject = f"{pinned.name}/{path}"
        ranged = start > 0 or stop is not None
        fault = self._fault("read", path, ranged=ranged)
        if fault.wait_for:
            fault.wait_for.wait(60)
        if fault.error:
            raise fault.error
        if fault.ignore_range or (ranged and not self._ranges):
            raise RangeIgnored(subject)
        if path not in self.files:
            raise SourceNotFound("no such file", subject=subject)
        entry = pinned.file(path)
        if entry.version and entry != self.file(path):
            raise SourceChanged("the file changed at the origin", subject=subject)
        yield self._response(read, fault, subject)

    def _response(self, read: Read, fault: Fault, subject: str) -> Iterator[bytes]:
        content = bytearray(self.files[read.path])
        if fault.corrupt is not None:
            content[fault.corrupt] ^= 0xFF
        body = bytes(content[read.start : read.stop]) + fault.extra
        ends = [end for end in (fault.cut_after, fault.silent_after, fault.end_after) if end is not None]
        body = body[: min(ends)] if ends else body
        for offset in range(0, len(body), self._chunk):
            chunk = body[offset : offset + self._chunk]
            with self._lock:
                read.sent += len(chunk)
            yield chunk
        if fault.cut_after is not None:
            raise TransientOriginError("the connection was closed", subject=subject)
        if fault.silent_after is not None:
            raise Silent("the origin sends no more bytes", subject=subject)

    def check_access(self, source: Source) -> None:
        """See `Origin.check_access`; a `Fault` on it makes it fail."""
        self.access_checks.append(source)
        if error := self._fault("check_access", "").error:
            raise error

    def close(self) -> None:
        """See `Origin.close`."""
        with self._lock:
            self.closed += 1

    def _fault(self, on: str, path: str, *, ranged: bool = False) -> Fault:
        with self._lock:
            for fault in self.faults:
                if fault.on == on and fault.path in ("", path) and (ranged or not fault.ignore_range):
                    if fault.times is not None:
                        fault.times -= 1
                        if fault.times == 0:
                            self.faults.remove(fault)
                    return fault
        return Fault()
