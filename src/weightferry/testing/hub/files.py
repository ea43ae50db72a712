"""Answers requests for files: the redirects of ``/resolve/``, and the content."""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import PurePosixPath
from urllib.parse import quote, unquote, urlsplit

from weightferry.testing.hub.access import find_commit
from weightferry.testing.hub.commits import ContentGoneError, Entry
from weightferry.testing.hub.messages import (
    ErrorResponse,
    Request,
    Response,
    content_response,
    error_response,
    same_etag,
)
from weightferry.testing.hub.repositories import Repo
from weightferry.testing.hub.signed_urls import SignedUrls
from weightferry.testing.hub.xet import Xet

# The CDN in front of the Hub compresses these text files, and never LFS files.
_TEXT = {".cfg", ".csv", ".html", ".jinja", ".json", ".jsonl", ".md", ".py", ".txt", ".xml", ".yaml", ".yml"}

_LOOPBACK_NAMES = {"127.0.0.1": "localhost", "localhost": "127.0.0.1"}


def alternative_host_name(host: str) -> str:
    """Return another name of the same host if there is one, else the same name.

    huggingface_hub 1.30 to 2.1 takes every port of the Hub's host for the Hub, and expects the Hub's headers there.
    """
    return _LOOPBACK_NAMES.get(host, host)


class Files:
    """Answers requests for files.

    Parameters
    ----------
    cdn
        Host and port of the CDN, which serves LFS files. An empty host means the `alternative_host_name` of the name
        that the client uses.
    xet
        Serves LFS files through Xet as well; None: no Xet.
    compress_text
        Whether to compress text for clients that accept it.
    """

    def __init__(self, signed_urls: SignedUrls, cdn: tuple[str, int], xet: Xet | None, *, compress_text: bool) -> None:
        self._signed_urls = signed_urls
        self._cdn = cdn
        self._xet = xet
        self._compress_text = compress_text

    def resolve(self, request: Request, repo: Repo, revision: str, path: str) -> Response:
        """Redirect to a file: an LFS file to the CDN, any other file to a path with the commit."""
        entry, headers = _find(repo, revision, path)
        headers = {**headers, "X-Linked-ETag": f'"{entry.etag}"', "Accept-Ranges": "bytes"}
        location_path = f"{repo.type}s/{repo.id}/{headers['X-Repo-Commit']}/{quote(path)}"
        if entry.sha256:
            query = self._signed_urls.query(unquote(f"/repos/{location_path}"))
            location = f"{self.cdn_url(request)}/repos/{location_path}?{query}"
            if self._xet:
                headers = {**headers, **self._xet.headers(request, repo, entry, headers["X-Repo-Commit"])}
            return _redirect(302, "Found", location, {**headers, "X-Linked-Size": str(entry.blob.size)})
        if same_etag(request.headers.get("If-None-Match"), f'"{entry.oid}"'):
            return Response(304, {**headers, "ETag": f'"{entry.oid}"'})
        origin_path = quote(request.target.partition("?")[0], safe="")
        location = f"/api/resolve-cache/{location_path}?{origin_path}=&etag={quote(chr(34) + entry.oid + chr(34))}"
        # The Hub sends no X-Linked-Size here either: only the target of the redirect knows the size.
        return _redirect(307, "Temporary Redirect", location, headers)

    def git_file(self, request: Request, repo: Repo, revision: str, path: str) -> Response:
        """Serve a file that is in git, not in LFS."""
        entry, headers = _find(repo, revision, path)
        _check_unchanged(entry)
        response = content_response(
            request, entry.blob, f'"{entry.oid}"', {**headers, "Content-Type": "text/plain; charset=utf-8"}
        )
        accepts_gzip = self._compress_text and "gzip" in request.headers.get("Accept-Encoding", "")
        if accepts_gzip and request.method == "GET" and response.status < 300 and PurePosixPath(path).suffix in _TEXT:
            return _gzip_response(response, entry)
        return response

    def lfs_file(self, request: Request, repo: Repo, sha: str, path: str) -> Response:
        """Serve an LFS file at the CDN; the request needs a valid signed URL and no Authorization header."""
        if "Authorization" in request.headers:
            # S3 and similar stores refuse two ways to authenticate. A client must not send its token to the CDN.
            raise ErrorResponse(error_response(400, "Only one auth mechanism allowed"))
        self._signed_urls.check(request)
        entry, headers = _find(repo, sha, path)
        _check_unchanged(entry)
        # The ETag of the Hub's CDN looks like a SHA-256 and is not the file's SHA-256.
        etag = hashlib.sha256(f"cdn:{entry.etag}".encode()).hexdigest()
        return content_response(
            request,
            entry.blob,
            f'"{etag}"',
            {
                "Content-Type": "application/octet-stream",
                "Content-Disposition": headers["Content-Disposition"],
                "Cache-Control": "public, max-age=31536000, immutable",
            },
        )

    def cdn_url(self, request: Request) -> str:
        """Return the URL of the CDN, with a host name that the client of this request can resolve."""
        host, port = self._cdn
        # The client's name for this machine works for it through containers and network namespaces too.
        host_in_request = urlsplit("//" + request.headers.get("Host", "localhost")).hostname or "localhost"
        return f"http://{host or alternative_host_name(host_in_request)}:{port}"


def _find(repo: Repo, revision: str, path: str) -> tuple[Entry, Mapping[str, str]]:
    commit = find_commit(repo, revision)
    entry = commit.files.get(path)
    if entry is None:
        # With the commit: huggingface_hub notes in its cache of that commit that the file does not exist.
        raise ErrorResponse(error_response(404, "Entry not found", "EntryNotFound", X_Repo_Commit=commit.sha))
    name = path.rpartition("/")[2]
    ascii_name = "".join(c if c.isascii() and c.isprintable() and c not in '"\\' else "_" for c in name)
    disposition = f"inline; filename*=UTF-8''{quote(name)}; filename=\"{ascii_name}\";"
    return entry, {"X-Repo-Commit": commit.sha, "Content-Disposition": disposition}


def _check_unchanged(entry: Entry) -> None:
    try:
        entry.blob.check()
    except ContentGoneError as error:
        raise ErrorResponse(error_response(410, str(error))) from error


def _redirect(status: int, reason: str, location: str, headers: Mapping[str, str]) -> Response:
    text = {"Location": location, "Content-Type": "text/plain; charset=utf-8", "Vary": "Origin, Accept"}
    return Response(status, {**headers, **text}, f"{reason}. Redirecting to {location}".encode())


def _gzip_response(response: Response, entry: Entry) -> Response:
    body = gzip.compress(b"".join(entry.blob.chunks()), compresslevel=1)
    headers = {
        name: value for name, value in response.headers.items() if name not in ("Content-Range", "Accept-Ranges")
    }
    response = Response(200, headers, body, chunked=True).with_header(Content_Encoding="gzip", Vary="Accept-Encoding")
    return replace(response, headers={**response.headers, "ETag": f'W/"{entry.oid}"'})
