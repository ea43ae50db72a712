"""Stand-ins for the rest of an operation."""

from __future__ import annotations

from weightferry.manifest import Manifest, Pinned
from weightferry.sources import Source
from weightferry.testing.origin import FakeOrigin


class Over(Exception):
    """The operation is over."""


class FakeWatch:
    """Counts bytes; `over` ends the operation at the next check."""

    def __init__(self) -> None:
        self.bytes, self.checks, self.over = 0, 0, False

    def moved(self, count: int) -> None:
        self.bytes += count

    def check(self) -> None:
        self.checks += 1
        if self.over:
            raise Over


SOURCE = Source("s3", "s3://bucket/model")


def pin(origin: FakeOrigin, source: Source = SOURCE) -> Pinned:
    return origin.resolve(source, [""])


def manifest_of(origin: FakeOrigin, source: Source = SOURCE) -> Manifest:
    return Manifest((pin(origin, source),))


def hub_source(revision: str | None = None, *, root: str = "org/model", repo_type: str = "model") -> Source:
    return Source("hf", root, revision=revision, repo_type=repo_type)


def environ(**variables: object) -> dict[str, str]:
    return {name: str(value) for name, value in variables.items()}
