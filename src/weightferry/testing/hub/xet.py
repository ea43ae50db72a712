"""The part of Xet, the Hub's chunk storage, that readers need: tokens, reconstructions and blocks of chunks.

By Xet's published protocol (https://huggingface.co/docs/xet): a reconstruction lists terms and the URLs of their bytes.
Each term is a range of chunks of a block ("xorb"). Each chunk in a block follows a header of 8 bytes. In this server,
every file has its own blocks, all chunks have the same size, and none is compressed.
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
from weightferry.testing.hub.messages import ErrorResponse, Request, Response, error_response, json_response
from weightferry.testing.hub.repositories import Repo
from weightferry.testing.hub.signed_urls import SignedUrls

CHUNK = 1 << 16
"""Bytes of a chunk. The Hub cuts chunks by content; they have 64 KiB on average."""
CHUNKS_PER_BLOCK = 128
"""On the Hub, a block has up to 64 MiB."""
_HEADER = 8
_LIFETIME = 3600


class Xet:
    """Serves files as chunks; it knows the files that `headers` was called for.

    Parameters
    ----------
    signed_urls
        Signs the URLs of blocks.
    """

    def __init__(self, signed_urls: SignedUrls) -> None:
        self._signed_urls = signed_urls
        self._token = secrets.token_hex(16)
        self._files: dict[str, tuple[str, Blob]] = {}

    def headers(self, request: Request, repo: Repo, entry: Entry, commit: str) -> dict[str, str]:
        """Return the headers that tell clients to read a file through Xet."""
        # Only the form of the hash must be right: a reader cannot check it without all chunks.
        name = hashlib.sha256(f"xet:{entry.sha256}".encode()).hexdigest()
        self._files[name] = f"{repo.page}/{entry.path}", entry.blob
        route = f"http://{request.headers.get('Host', 'localhost')}/api/{repo.type}s/{repo.id}/xet-read-token/{commit}"
        return {"X-Xet-Hash": name, "Link": f'<{quote(route, safe="/:")}>; rel="xet-auth"'}

    def path(self, name: str) -> str:
        """Return the file of a Xet hash, for the request log; empty if unknown."""
        return self._files[name][0] if name in self._files else ""

    def token(self, cas_url: str) -> Response:
        """Return a token for the storage at `cas_url`; the caller has checked the access."""
        expires = int(time.time()) + _LIFETIME
        return json_response({"accessToken": self._token, "exp": expires, "casUrl": cas_url}).with_header(
            X_Xet_Access_Token=self._token, X_Xet_Token_Expiration=str(expires), X_Xet_Cas_Url=cas_url
        )

    def reconstruction(self, request: Request, name: str) -> Response:
        """Return the chunks of a file, or of the requested range of it."""
        if not hmac.compare_digest((request.token or "").encode(), self._token.encode()):
            raise ErrorResponse(error_response(401, "the token for the Xet storage is missing or invalid"))
        blob = self._blob(name)
        start, stop = _range(request, blob.size)
        if start >= stop:
            raise ErrorResponse(error_response(416, "The requested range is not satisfiable"))
        base = f"http://{request.headers.get('Host', 'localhost')}"
        first, last = start // CHUNK, -(-stop // CHUNK)
        terms: list[dict[str, Any]] = []
        fetch: dict[str, Any] = {}
        for number in range(first // CHUNKS_PER_BLOCK, -(-last // CHUNKS_PER_BLOCK)):
            low, high = (
                max(first - number * CHUNKS_PER_BLOCK, 0),
                min(last - number * CHUNKS_PER_BLOCK, CHUNKS_PER_BLOCK),
            )
            block, chunks = _block_hash(name, number), {"start": low, "end": high}
            begin, end = ((number * CHUNKS_PER_BLOCK + chunk) * CHUNK for chunk in (low, high))
            terms.append({"hash": block, "unpacked_length": min(end, blob.size) - begin, "range": chunks})
            path = f"/xet/{name}/{number}"
            file_range = {"start": _packed_size(low), "end": _packed_size(high) - max(0, end - blob.size) - 1}
            fetch[block] = [
                {"range": chunks, "url": f"{base}{path}?{self._signed_urls.query(path)}", "url_range": file_range}
            ]
        return json_response({"offset_into_first_range": start - first * CHUNK, "terms": terms, "fetch_info": fetch})

    def block(self, request: Request, name: str, number: str) -> Response:
        """Serve a block, or a range of it; the request needs a valid signed URL."""
        self._signed_urls.check(request)
        blob = self._blob(name)
        begin = int(number) * CHUNKS_PER_BLOCK * CHUNK if number.isdecimal() else blob.size
        if begin >= blob.size:
            raise ErrorResponse(error_response(404, "no such block"))
        body = _pack_chunks(blob, begin, min(begin + CHUNKS_PER_BLOCK * CHUNK, blob.size))
        start, stop = _range(request, len(body))
        file_range = f"bytes {start}-{stop - 1}/{len(body)}"
        return (
            Response(206, {"Content-Range": file_range}, body[start:stop]) if request.range else Response(200, {}, body)
        )

    def _blob(self, name: str) -> Blob:
        if name not in self._files:
            raise ErrorResponse(error_response(404, "no such file"))
        return self._files[name][1]


def _range(request: Request, size: int) -> tuple[int, int]:
    match = re.fullmatch(r"bytes=(\d+)-(\d*)", request.range or "bytes=0-")
    if not match:
        raise ErrorResponse(error_response(400, "the Range header must be bytes=FIRST-LAST"))
    return int(match[1]), min(int(match[2]) + 1, size) if match[2] else size


def _block_hash(name: str, number: int) -> str:
    return hashlib.sha256(f"{name} {number}".encode()).hexdigest()


def _packed_size(chunks: int) -> int:
    """Return the bytes of `chunks` full chunks with their headers."""
    return chunks * (CHUNK + _HEADER)


def _pack_chunks(blob: Blob, start: int, stop: int) -> bytes:
    """Write chunks with their headers: version, stored size, compression (0: none), original size."""
    content = blob.read(start, stop)
    chunks = [content[offset : offset + CHUNK] for offset in range(0, len(content), CHUNK)]
    return b"".join(
        b"".join((b"\0", len(chunk).to_bytes(3, "little"), b"\0", len(chunk).to_bytes(3, "little"), chunk))
        for chunk in chunks
    )
