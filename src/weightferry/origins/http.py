"""Files behind plain http(s) URLs."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
    version_of,
)
from weightferry.origins.transport import HttpClient, Response
from weightferry.settings import Settings
from weightferry.sources import Source

# Status codes after which GET is tried: many signed URLs are valid only for GET, and some servers do not support HEAD.
_HEAD_REFUSED = (403, 405, 501)


class HttpOrigin:
    """Reads files behind http(s) URLs. A file is pinned by its ETag, else by its modification time and size."""

    def __init__(self, settings: Settings) -> None:
        self._client = HttpClient(settings)

    def resolve(self, source: Source, paths: Sequence[str]) -> PinnedSource:
        """See `Origin.resolve`. It costs one request for each file, or two if the first does not tell about ranges."""
        files = tuple(self._resolve_file(source, path) for path in paths)
        return PinnedSource(source, listing_commit(files), files)

    def _resolve_file(self, source: Source, path: str) -> File:
        url, subject = _url(source, path), _subject(source, path)
        answer = self._head(url, subject)
        if answer.status not in _HEAD_REFUSED:
            raise_for_status(answer, subject)
        size = total_size(answer.headers, answer.status) if answer.status == 200 else None
        ranges = size is not None and (size == 0 or answer.headers.get("Accept-Ranges") == "bytes")
        if not ranges:
            answer = self._first_byte(url, subject)
            size = total_size(answer.headers, answer.status) if size is None else size
            ranges = answer.status == 206 or size == 0
        # An empty file has no first byte.
        if not (answer.status == 416 and size == 0):
            raise_for_status(answer, subject)
        # Without a validator a cached copy cannot be recognized later, so the current time becomes the version.
        return File(path, size, version=version_of(answer.headers) or f"{_TIME_PREFIX}{time.time_ns()}", ranges=ranges)

    def _head(self, url: str, subject: str) -> Response:
        with self._client.stream("HEAD", url, headers=IDENTITY, subject=subject) as answer:
            return answer

    def _first_byte(self, url: str, subject: str) -> Response:
        headers = {**IDENTITY, "Range": "bytes=0-0"}
        with self._client.stream("GET", url, headers=headers, subject=subject) as answer:
            return answer  # closed at once: the server may send the whole file

    @contextmanager
    def read(
        self, pinned: PinnedSource, path: str, start: int = 0, stop: int | None = None
    ) -> Iterator[Iterator[bytes]]:
        """See `Origin.read`."""
        source, file = pinned.source, pinned.file(path)
        version = "" if file.version.startswith(_TIME_PREFIX) else file.version
        request = RangeRequest(_url(source, path), _subject(source, path), start, stop, size=file.size, version=version)
        with get_range(self._client, request) as response:
            yield response.body

    def check_access(self, source: Source) -> None:
        """See `Origin.check_access`."""
        url, subject = _url(source, source.path), _subject(source, source.path)
        answer = self._head(url, subject)
        if source.path and answer.status in _HEAD_REFUSED:
            answer = self._first_byte(url, subject)
        error = status_error(answer.status, answer.headers, subject)
        if answer.status == 401 or isinstance(error, TransientOriginError):
            raise error
        if source.path:  # without a path the URL is a folder, and any answer is fine
            raise_for_status(answer, subject)

    def close(self) -> None:
        """See `Origin.close`."""
        self._client.close()


_TIME_PREFIX = "seen "
"""Marks a version that is only the time of the request."""


def _subject(source: Source, path: str) -> str:
    return str(Source(source.scheme, source.root, path, query=source.query))


def _url(source: Source, path: str) -> str:
    return f"{source.root}/{quote(path, safe='')}" + (f"?{source.query}" if source.query else "")
