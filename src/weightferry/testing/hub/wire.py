"""HTTP as values: a request, the answer to it, and which part of a file a range asks for."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import parse_qs, unquote

from weightferry.testing.hub.commits import Blob
from weightferry.testing.hub.records import Side

_RANGE = re.compile(r"bytes=\s*(\d*)\s*-\s*(\d*)\s*")


@dataclass(frozen=True)
class Request:
    """A request as it was read.

    Attributes
    ----------
    target
        Path and query as they came.
    headers
        Looked up without regard to case.
    ranges
        Whether to take notice of a Range header.
    """

    side: Side
    method: str
    target: str
    headers: Mapping[str, str]
    body: bytes = b""
    ranges: bool = True

    @property
    def segments(self) -> list[str]:
        """The parts of the path, each decoded; a decoded part can hold slashes, as branches and paths do."""
        return [unquote(part) for part in self.target.partition("?")[0].lstrip("/").split("/")]

    @property
    def path(self) -> str:
        """The decoded path."""
        return "/" + "/".join(self.segments)

    @property
    def query(self) -> dict[str, list[str]]:
        """The decoded query; ``expand[]`` is the Hub's other spelling of ``expand``."""
        pairs = parse_qs(self.target.partition("?")[2], keep_blank_values=True)
        return {name.removesuffix("[]"): values for name, values in pairs.items()}

    def flag(self, name: str) -> bool:
        """Whether a query parameter is there and true."""
        return self.query.get(name, ["false"])[-1].lower() in ("1", "true")

    @property
    def range(self) -> str | None:
        """The Range header."""
        return self.headers.get("Range") if self.ranges else None

    @property
    def token(self) -> str | None:
        """The bearer token; an Authorization of another kind is an empty, thus invalid, token."""
        header = self.headers.get("Authorization")
        if header is None:
            return None
        scheme, _, token = header.partition(" ")
        return token.strip() if scheme.lower() == "bearer" else ""


@dataclass(frozen=True)
class FileSlice:
    """Bytes `start` to `stop` of a blob."""

    blob: Blob
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Answer:
    """A status, headers and a body; Content-Length comes from the body.

    Attributes
    ----------
    chunked
        Send the body in chunks, without a Content-Length.
    ranged
        Whether the request's range decided what the answer holds.
    """

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | FileSlice = b""
    chunked: bool = False
    ranged: bool = False

    @property
    def span(self) -> range:
        """The bytes of a file in the body."""
        return range(self.body.start, self.body.stop) if isinstance(self.body, FileSlice) else range(0)

    def plus(self, **headers: str) -> Answer:
        """Return it with more headers; underscores in their names stand for hyphens."""
        return self.with_headers({name.replace("_", "-"): value for name, value in headers.items()})

    def with_headers(self, headers: Mapping[str, str]) -> Answer:
        """Return it with more headers."""
        return replace(self, headers={**self.headers, **headers})


class RefusedError(Exception):
    """Ends the work on a request with an error answer."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer.status)
        self.answer = answer


def json_answer(data: Any, status: int = 200) -> Answer:
    """Answer with JSON."""
    return Answer(status, {"Content-Type": "application/json; charset=utf-8"}, json.dumps(data).encode())


def error(status: int, message: str, code: str = "", **headers: str) -> Answer:
    """Answer as the Hub does: a code for programs in a header, the text in a header and in the body."""
    # A header holds one line of latin-1, and the text may quote what the client asked for.
    line = " ".join(message.encode("ascii", "replace").decode().split())
    answer = json_answer({"error": message}, status).plus(X_Error_Message=line, **headers)
    return answer.plus(X_Error_Code=code) if code else answer


def content(request: Request, blob: Blob, etag: str, headers: Mapping[str, str]) -> Answer:
    """Answer with a file, or with the part of it that is wanted (RFC 9110, sections 13 and 14).

    One range is understood. Several are ignored, as S3 does, and so is a range in a HEAD.
    """
    headers = {**headers, "ETag": etag, "Accept-Ranges": "bytes"}
    if same_etag(request.headers.get("If-None-Match"), etag):
        return Answer(304, headers)
    span = _span(request.range or "", blob.size) if request.method == "GET" and _range_counts(request, etag) else None
    if span is None:
        return Answer(200, headers, FileSlice(blob, 0, blob.size))
    if not span:
        refusal = error(416, "The requested range is not satisfiable", Content_Range=f"bytes */{blob.size}")
        return replace(refusal, ranged=True)
    partial = Answer(206, headers, FileSlice(blob, span.start, span.stop), ranged=True)
    return partial.plus(Content_Range=f"bytes {span.start}-{span.stop - 1}/{blob.size}")


def same_etag(header: str | None, etag: str) -> bool:
    """Whether an If-None-Match header names this ETag; weak ones compare equal."""
    tags = [tag.strip().removeprefix("W/") for tag in (header or "").split(",")]
    return "*" in tags or etag.removeprefix("W/") in tags


def _range_counts(request: Request, etag: str) -> bool:
    # A date cannot be compared: nothing here has a Last-Modified. It then counts as changed, which is safe.
    condition = request.headers.get("If-Range")
    return condition is None or condition.strip() == etag


def _span(header: str, size: int) -> range | None:
    """Return the bytes that a Range header asks for, empty where there are none; None where it is not understood."""
    match = _RANGE.fullmatch(header)
    if not match or match[1] == match[2] == "":
        return None
    first, last = match[1], match[2]
    if not first:
        return range(max(0, size - int(last)), size)
    if last and int(last) < int(first):
        return None
    return range(int(first), min(int(last) + 1, size) if last else size)
