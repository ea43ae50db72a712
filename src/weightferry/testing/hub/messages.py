"""HTTP requests and responses as values, and the interpretation of a Range header."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import parse_qs, unquote

from weightferry.testing.hub.commits import Blob
from weightferry.testing.hub.request_log import Side

_RANGE = re.compile(r"bytes=\s*(\d*)\s*-\s*(\d*)\s*")


@dataclass(frozen=True)
class Request:
    """A request as the server read it.

    Attributes
    ----------
    target
        Path and query, still encoded.
    headers
        Their names are case-insensitive.
    ranges
        False: ignore the Range header.
    """

    side: Side
    method: str
    target: str
    headers: Mapping[str, str]
    body: bytes = b""
    ranges: bool = True

    @property
    def segments(self) -> list[str]:
        """The decoded parts of the path; a decoded part may contain slashes, as branches and paths do."""
        return [unquote(part) for part in self.target.partition("?")[0].lstrip("/").split("/")]

    @property
    def path(self) -> str:
        """The decoded path."""
        return "/" + "/".join(self.segments)

    @property
    def query(self) -> dict[str, list[str]]:
        """The decoded query; the Hub also writes ``expand[]`` for ``expand``."""
        pairs = parse_qs(self.target.partition("?")[2], keep_blank_values=True)
        return {name.removesuffix("[]"): values for name, values in pairs.items()}

    def flag(self, name: str) -> bool:
        """Whether a query parameter is present and true."""
        return self.query.get(name, ["false"])[-1].lower() in ("1", "true")

    @property
    def range(self) -> str | None:
        """The Range header; None if there is none or `ranges` is False."""
        return self.headers.get("Range") if self.ranges else None

    @property
    def token(self) -> str | None:
        """The bearer token; empty, and so invalid, for an Authorization header of another kind."""
        header = self.headers.get("Authorization")
        if header is None:
            return None
        scheme, _, token = header.partition(" ")
        return token.strip() if scheme.lower() == "bearer" else ""


@dataclass(frozen=True)
class FileSlice:
    """The bytes from `start` to `stop` of a blob."""

    blob: Blob
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Response:
    """A status, headers and a body; Content-Length comes from the body.

    Attributes
    ----------
    chunked
        Send the body in chunks, without a Content-Length.
    used_range
        Whether the request's Range header decided the response.
    """

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | FileSlice = b""
    chunked: bool = False
    used_range: bool = False

    @property
    def file_range(self) -> range:
        """The range of file offsets in the body; empty if the body holds no part of a file."""
        return range(self.body.start, self.body.stop) if isinstance(self.body, FileSlice) else range(0)

    def with_header(self, **headers: str) -> Response:
        """Return a copy with more headers; an underscore in a name stands for a hyphen."""
        return self.with_headers({name.replace("_", "-"): value for name, value in headers.items()})

    def with_headers(self, headers: Mapping[str, str]) -> Response:
        """Return a copy with more headers."""
        return replace(self, headers={**self.headers, **headers})


class ErrorResponse(Exception):
    """Raised to answer a request with an error."""

    def __init__(self, response: Response) -> None:
        super().__init__(response.status)
        self.response = response


def json_response(data: Any, status: int = 200) -> Response:
    """Return a response with a JSON body."""
    return Response(status, {"Content-Type": "application/json; charset=utf-8"}, json.dumps(data).encode())


def error_response(status: int, message: str, code: str = "", **headers: str) -> Response:
    """Return an error as the Hub does: a code for programs in a header, the text in a header and in the body."""
    # A header is one line of latin-1, and the message may quote the request.
    line = " ".join(message.encode("ascii", "replace").decode().split())
    response = json_response({"error": message}, status).with_header(X_Error_Message=line, **headers)
    return response.with_header(X_Error_Code=code) if code else response


def content_response(request: Request, blob: Blob, etag: str, headers: Mapping[str, str]) -> Response:
    """Return a file, or the requested range of it (RFC 9110, sections 13 and 14).

    It serves one range. Like S3, it ignores a header with several ranges, and a range in a HEAD request.
    """
    headers = {**headers, "ETag": etag, "Accept-Ranges": "bytes"}
    if same_etag(request.headers.get("If-None-Match"), etag):
        return Response(304, headers)
    file_range = (
        _parse_range(request.range or "", blob.size) if request.method == "GET" and _use_range(request, etag) else None
    )
    if file_range is None:
        return Response(200, headers, FileSlice(blob, 0, blob.size))
    if not file_range:
        unsatisfiable = error_response(
            416, "The requested range is not satisfiable", Content_Range=f"bytes */{blob.size}"
        )
        return replace(unsatisfiable, used_range=True)
    partial = Response(206, headers, FileSlice(blob, file_range.start, file_range.stop), used_range=True)
    return partial.with_header(Content_Range=f"bytes {file_range.start}-{file_range.stop - 1}/{blob.size}")


def same_etag(header: str | None, etag: str) -> bool:
    """Whether an If-None-Match header names this ETag; weak ones compare equal."""
    tags = [tag.strip().removeprefix("W/") for tag in (header or "").split(",")]
    return "*" in tags or etag.removeprefix("W/") in tags


def _use_range(request: Request, etag: str) -> bool:
    # If-Range may hold a date. This server sends no Last-Modified, so the file counts as changed: that is safe.
    condition = request.headers.get("If-Range")
    return condition is None or condition.strip() == etag


def _parse_range(header: str, size: int) -> range | None:
    """Return the requested range of a file, empty if out of bounds; None for a header that the server ignores."""
    match = _RANGE.fullmatch(header)
    if not match or match[1] == match[2] == "":
        return None
    first, last = match[1], match[2]
    if not first:
        return range(max(0, size - int(last)), size)
    if last and int(last) < int(first):
        return None
    return range(int(first), min(int(last) + 1, size) if last else size)
