"""Plain http(s) files."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote

from weightferry.manifest import File, PinnedSource, listing_commit
from weightferry.origins.base import TransientOriginError
from weightferry.origins.range_request import (
    IDENTITY,
    RangeRequest,
    get_range,
    raise_for_status,
    status_error,
    total_size,
    translate_http_errors,
    version_of,
)
from weightferry.origins.transport import new_client
from weightferry.settings import Settings
from weightferry.sources import Source

# Signed URLs are often signed for GET alone, and some servers know no HEAD.
_NO_HEAD = (403, 405, 501)


class HttpOrigin:
    """Files behind http(s) URLs. They are pinned by ETag, else by modification time and size."""

    def __init__(self, settings: Settings) -> None:
        self._client = new_client(settings)

    def resolve(self, source: Source, paths: Sequence[str]) -> PinnedSource:
        """See `Origin.resolve`; one request a file, two where the first says nothing of ranges: http has no folders."""
        files = tuple(self._look(source, path) for path in paths)
        return PinnedSource(source, listing_commit(files), files)

    def _look(self, source: Source, path: str) -> File:
        url, subject = _url(source, path), _named(source, path)
        with translate_http_errors(subject):
            answer = self._client.head(url, headers=IDENTITY)
            if answer.status_code not in _NO_HEAD:
                raise_for_status(answer, subject)
            size = total_size(answer.headers, answer.status_code) if answer.status_code == 200 else None
            ranges = size is not None and (size == 0 or answer.headers.get("Accept-Ranges") == "bytes")
            if not ranges:
                answer = self._first_byte(url)
                size = total_size(answer.headers, answer.status_code) if size is None else size
                ranges = answer.status_code == 206 or size == 0
        # An empty file has no first byte.
        if not (answer.status_code == 416 and size == 0):
            raise_for_status(answer, subject)
        # Without any validator nothing says that a cached copy is still the file: this moment is then its version.
        return File(path, size, version=version_of(answer.headers) or f"{_SEEN}{time.time_ns()}", ranges=ranges)

    def _first_byte(self, url: str) -> Any:
        with self._client.stream("GET", url, headers={**IDENTITY, "Range": "bytes=0-0"}) as answer:
            return answer  # closed at once: the whole file may be on its way

    @contextmanager
    def read(
        self, pinned: PinnedSource, path: str, start: int = 0, stop: int | None = None
    ) -> Iterator[Iterator[bytes]]:
        """See `Origin.read`."""
        source, file = pinned.source, pinned.file(path)
        version = "" if file.version.startswith(_SEEN) else file.version
        wanted = RangeRequest(_url(source, path), _named(source, path), start, stop, size=file.size, version=version)
        with get_range(self._client, wanted) as response:
            yield response.iter_raw()

    def check_access(self, source: Source) -> None:
        """See `Origin.check_access`."""
        url, subject = _url(source, source.path), _named(source, source.path)
        with translate_http_errors(subject):
            answer = self._client.head(url, headers=IDENTITY)
            if source.path and answer.status_code in _NO_HEAD:
                answer = self._first_byte(url)
        error = status_error(answer.status_code, answer.headers, subject)
        if answer.status_code == 401 or isinstance(error, TransientOriginError):
            raise error
        if source.path:  # what lies above files is no file itself, and may be answered in any way
            raise_for_status(answer, subject)

    def close(self) -> None:
        """See `Origin.close`."""
        self._client.close()


_SEEN = "seen "


def _named(source: Source, path: str) -> str:
    return str(Source(source.scheme, source.root, path, query=source.query))


def _url(source: Source, path: str) -> str:
    return f"{source.root}/{quote(path, safe='')}" + (f"?{source.query}" if source.query else "")
