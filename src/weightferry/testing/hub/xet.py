"""What readers need of Xet, the Hub's storage of chunks: a token, how a file is made of chunks, and blocks of them.

By Xet's published protocol (https://huggingface.co/docs/xet): a reconstruction lists terms, each a range of chunks of a
block ("xorb"), and says where to fetch their bytes; each chunk in a block follows a header of 8 bytes. Here every file
has blocks of its own, all chunks have one size, and none is compressed.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
from typing import Any
from urllib.parse import quote

from weightferry.testing.hub.commits import Blob, Entry
from weightferry.testing.hub.repos import Repo
from weightferry.testing.hub.signed_links import SignedLinks
from weightferry.testing.hub.wire import Answer, RefusedError, Request, error, json_answer

CHUNK = 1 << 16
"""Bytes of a chunk; on the Hub they are cut by content, and 64 KiB on average."""
BLOCK = 128
"""Chunks of a block; on the Hub up to 64 MiB in all."""
_HEADER = 8
_LIFETIME = 3600


class Xet:
    """The files that `announce` was asked about, as chunks.

    Parameters
    ----------
    links
        What signs the links to blocks.
    """

    def __init__(self, links: SignedLinks) -> None:
        self._links = links
        self._token = secrets.token_hex(16)
        self._files: dict[str, tuple[str, Blob]] = {}

    def announce(self, request: Request, repo: Repo, entry: Entry, commit: str) -> dict[str, str]:
        """Return the headers by which the Hub says that a file can be read here."""
        # Of the right form is all that it must be: readers cannot check it, as they would need all chunks for that.
        name = hashlib.sha256(f"xet:{entry.sha256}".encode()).hexdigest()
        self._files[name] = f"{repo.page}/{entry.path}", entry.blob
        route = f"http://{request.headers.get('Host', 'localhost')}/api/{repo.type}s/{repo.id}/xet-read-token/{commit}"
        return {"X-Xet-Hash": name, "Link": f'<{quote(route, safe="/:")}>; rel="xet-auth"'}

    def path(self, name: str) -> str:
        """Which file it is, for records; empty if none."""
        return self._files[name][0] if name in self._files else ""

    def token(self, cas_url: str) -> Answer:
        """Give the token for the storage, at `cas_url`, to who may read a repository."""
        expires = int(time.time()) + _LIFETIME
        return json_answer({"accessToken": self._token, "exp": expires, "casUrl": cas_url}).plus(
            X_Xet_Access_Token=self._token, X_Xet_Token_Expiration=str(expires), X_Xet_Cas_Url=cas_url
        )

    def reconstruction(self, request: Request, name: str) -> Answer:
        """Say how the file, or the asked range of it, is made of chunks."""
        if not hmac.compare_digest((request.token or "").encode(), self._token.encode()):
            raise RefusedError(error(401, "no valid token for the storage"))
        blob = self._blob(name)
        start, stop = _range(request, blob.size)
        if start >= stop:
            raise RefusedError(error(416, "The requested range is not satisfiable"))
        base = f"http://{request.headers.get('Host', 'localhost')}"
        first, last = start // CHUNK, -(-stop // CHUNK)
        terms: list[dict[str, Any]] = []
        fetch: dict[str, Any] = {}
        for number in range(first // BLOCK, -(-last // BLOCK)):
            low, high = max(first - number * BLOCK, 0), min(last - number * BLOCK, BLOCK)
            block, chunks = _name(name, number), {"start": low, "end": high}
            begin, end = ((number * BLOCK + chunk) * CHUNK for chunk in (low, high))
            terms.append({"hash": block, "unpacked_length": min(end, blob.size) - begin, "range": chunks})
            path = f"/xet/{name}/{number}"
            span = {"start": _packed(low), "end": _packed(high) - max(0, end - blob.size) - 1}
            fetch[block] = [{"range": chunks, "url": f"{base}{path}?{self._links.query(path)}", "url_range": span}]
        return json_answer({"offset_into_first_range": start - first * CHUNK, "terms": terms, "fetch_info": fetch})

    def block(self, request: Request, name: str, number: str) -> Answer:
        """Serve a block, or a range of its bytes, to who comes with a valid link."""
        self._links.check(request)
        blob = self._blob(name)
        begin = int(number) * BLOCK * CHUNK if number.isdecimal() else blob.size
        if begin >= blob.size:
            raise RefusedError(error(404, "no such block"))
        body = _pack(blob, begin, min(begin + BLOCK * CHUNK, blob.size))
        start, stop = _range(request, len(body))
        span = f"bytes {start}-{stop - 1}/{len(body)}"
        return Answer(206, {"Content-Range": span}, body[start:stop]) if request.range else Answer(200, {}, body)

    def _blob(self, name: str) -> Blob:
        if name not in self._files:
            raise RefusedError(error(404, "no such file"))
        return self._files[name][1]


def _range(request: Request, size: int) -> tuple[int, int]:
    match = re.fullmatch(r"bytes=(\d+)-(\d*)", request.range or "bytes=0-")
    if not match:
        raise RefusedError(error(400, "a range of another kind"))
    return int(match[1]), min(int(match[2]) + 1, size) if match[2] else size


def _name(name: str, number: int) -> str:
    return hashlib.sha256(f"{name} {number}".encode()).hexdigest()


def _packed(chunks: int) -> int:
    """Bytes of so many whole chunks in a block."""
    return chunks * (CHUNK + _HEADER)


def _pack(blob: Blob, start: int, stop: int) -> bytes:
    """Write chunks with their headers: version, bytes as stored, compression (0: none), bytes as they are."""
    content = blob.read(start, stop)
    chunks = [content[place : place + CHUNK] for place in range(0, len(content), CHUNK)]
    return b"".join(
        b"".join((b"\0", len(chunk).to_bytes(3, "little"), b"\0", len(chunk).to_bytes(3, "little"), chunk))
        for chunk in chunks
    )
