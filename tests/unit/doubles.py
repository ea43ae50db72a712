"""Stand-ins for the rest of an operation."""

from __future__ import annotations

from weightferry.cache.layout import CacheLayout
from weightferry.cache.locks import FileLocks, LockTimeouts
from weightferry.cache.survey import CacheSurveyor
from weightferry.cluster.coordinator import LocalCoordinator
from weightferry.manifest import Manifest, PinnedSource
from weightferry.sources import Source
from weightferry.testing.origin import FakeOrigin


class Over(Exception):
    """The operation is over."""


class FakeMonitor:
    """Counts bytes; `over` ends the operation at the next check."""

    def __init__(self) -> None:
        self.bytes, self.checks, self.over = 0, 0, False

    def count_bytes(self, count: int) -> None:
        self.bytes += count

    def check(self) -> None:
        self.checks += 1
        if self.over:
            raise Over


SOURCE = Source("s3", "s3://bucket/model")


def pin(origin: FakeOrigin, source: Source = SOURCE) -> PinnedSource:
    return origin.resolve(source, [""])


def manifest_of(origin: FakeOrigin, source: Source = SOURCE) -> Manifest:
    return Manifest((pin(origin, source),))


def hub_source(revision: str | None = None, *, root: str = "org/model", repo_type: str = "model") -> Source:
    return Source("hf", root, revision=revision, repo_type=repo_type)


def environ(**variables: object) -> dict[str, str]:
    return {name: str(value) for name, value in variables.items()}


class FakeCoordinator(LocalCoordinator):
    """An operation of one process that can be ended, and tells its bytes to a watch."""

    def __init__(self, monitor: FakeMonitor) -> None:
        super().__init__("h")
        self._monitor = monitor

    def count_bytes(self, count: int, peer: bool = False) -> None:
        self._monitor.count_bytes(count)

    def check(self) -> None:
        self._monitor.check()


def surveyor_of(layout: CacheLayout, manifest: Manifest) -> CacheSurveyor:
    """A surveyor whose locks are freed with it."""
    return CacheSurveyor(layout, manifest, FileLocks(LockTimeouts(0.2), lambda: None))
