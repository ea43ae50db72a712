"""The files of a Hub server: where ``/resolve/`` points, and what is served there."""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import PurePosixPath
from urllib.parse import quote, unquote, urlsplit

from weightferry.testing.hub.access import commit_of
from weightferry.testing.hub.commits import ContentGoneError, Entry
from weightferry.testing.hub.repos import Repo
from weightferry.testing.hub.signed_links import SignedLinks
from weightferry.testing.hub.wire import Answer, RefusedError, Request, content, error, same_etag
from weightferry.testing.hub.xet import Xet

# What the CDN before the Hub compresses; it does so for text and never for LFS files.
_TEXT = {".cfg", ".csv", ".html", ".jinja", ".json", ".jsonl", ".md", ".py", ".txt", ".xml", ".yaml", ".yml"}

# Of this machine to itself.
_NAMES = {"127.0.0.1": "localhost", "localhost": "127.0.0.1"}


def other_name(host: str) -> str:
    """Return another name of the same host where one is known.

    huggingface_hub 1.30 to 2.1 takes every port of a host for the Hub, and would look for the Hub's headers at the CDN.
    """
    return _NAMES.get(host, host)


class Files:
    """Answers requests for files.

    Parameters
    ----------
    cdn
        Host and port of the address where LFS files are; an empty host means `other_name` of the one that the client
        uses.
    xet
        Another way to read what is in LFS; None: there is none.
    compress_text
        Whether text goes out compressed to who accepts that.
    """

    def __init__(self, links: SignedLinks, cdn: tuple[str, int], xet: Xet | None, *, compress_text: bool) -> None:
        self._links = links
        self._cdn = cdn
        self._xet = xet
        self._compress_text = compress_text

    def resolve(self, request: Request, repo: Repo, revision: str, path: str) -> Answer:
        """Point to a file: LFS files are at the CDN, the others behind a path that names the commit."""
        entry, headers = _find(repo, revision, path)
        headers = {**headers, "X-Linked-ETag": f'"{entry.etag}"', "Accept-Ranges": "bytes"}
        where = f"{repo.type}s/{repo.id}/{headers['X-Repo-Commit']}/{quote(path)}"
        if entry.sha256:
            query = self._links.query(unquote(f"/repos/{where}"))
            location = f"{self.cdn_url(request)}/repos/{where}?{query}"
            if self._xet:
                headers = {**headers, **self._xet.announce(request, repo, entry, headers["X-Repo-Commit"])}
            return _redirect(302, "Found", location, {**headers, "X-Linked-Size": str(entry.blob.size)})
        if same_etag(request.headers.get("If-None-Match"), f'"{entry.oid}"'):
            return Answer(304, {**headers, "ETag": f'"{entry.oid}"'})
        came = quote(request.target.partition("?")[0], safe="")
        location = f"/api/resolve-cache/{where}?{came}=&etag={quote(chr(34) + entry.oid + chr(34))}"
        # No X-Linked-Size here on the Hub either: the size is known only where this leads.
        return _redirect(307, "Temporary Redirect", location, headers)

    def small(self, request: Request, repo: Repo, revision: str, path: str) -> Answer:
        """Serve a file that is not in LFS."""
        entry, headers = _find(repo, revision, path)
        _check(entry)
        answer = content(
            request, entry.blob, f'"{entry.oid}"', {**headers, "Content-Type": "text/plain; charset=utf-8"}
        )
        gzipped = self._compress_text and "gzip" in request.headers.get("Accept-Encoding", "")
        if gzipped and request.method == "GET" and answer.status < 300 and PurePosixPath(path).suffix in _TEXT:
            return _compressed(answer, entry)
        return answer

    def large(self, request: Request, repo: Repo, sha: str, path: str) -> Answer:
        """Serve a file in LFS, at the CDN, to who comes with a valid link and nothing else."""
        if "Authorization" in request.headers:
            # S3 and its like refuse two ways to authenticate; and a token has no business there.
            raise RefusedError(error(400, "Only one auth mechanism allowed"))
        self._links.check(request)
        entry, headers = _find(repo, sha, path)
        _check(entry)
        # The ETag of the Hub's CDN looks like a SHA-256 and is another hash than the file's.
        other = hashlib.sha256(f"cdn:{entry.etag}".encode()).hexdigest()
        return content(
            request,
            entry.blob,
            f'"{other}"',
            {
                "Content-Type": "application/octet-stream",
                "Content-Disposition": headers["Content-Disposition"],
                "Cache-Control": "public, max-age=31536000, immutable",
            },
        )

    def cdn_url(self, request: Request) -> str:
        """Where the CDN is, by a name that the client of this request knows."""
        host, port = self._cdn
        # The client's own name for this machine leads back here also through containers and network namespaces.
        own = urlsplit("//" + request.headers.get("Host", "localhost")).hostname or "localhost"
        return f"http://{host or other_name(own)}:{port}"


def _find(repo: Repo, revision: str, path: str) -> tuple[Entry, Mapping[str, str]]:
    commit = commit_of(repo, revision)
    entry = commit.files.get(path)
    if entry is None:
        # With the commit: huggingface_hub remembers there that the file does not exist.
        raise RefusedError(error(404, "Entry not found", "EntryNotFound", X_Repo_Commit=commit.sha))
    name = path.rpartition("/")[2]
    plain = "".join(c if c.isascii() and c.isprintable() and c not in '"\\' else "_" for c in name)
    disposition = f"inline; filename*=UTF-8''{quote(name)}; filename=\"{plain}\";"
    return entry, {"X-Repo-Commit": commit.sha, "Content-Disposition": disposition}


def _check(entry: Entry) -> None:
    try:
        entry.blob.check()
    except ContentGoneError as gone:
        raise RefusedError(error(410, str(gone))) from gone


def _redirect(status: int, reason: str, location: str, headers: Mapping[str, str]) -> Answer:
    text = {"Location": location, "Content-Type": "text/plain; charset=utf-8", "Vary": "Origin, Accept"}
    return Answer(status, {**headers, **text}, f"{reason}. Redirecting to {location}".encode())


def _compressed(answer: Answer, entry: Entry) -> Answer:
    packed = gzip.compress(b"".join(entry.blob.chunks()), compresslevel=1)
    plain = {name: value for name, value in answer.headers.items() if name not in ("Content-Range", "Accept-Ranges")}
    answer = Answer(200, plain, packed, chunked=True).plus(Content_Encoding="gzip", Vary="Accept-Encoding")
    return replace(answer, headers={**answer.headers, "ETag": f'W/"{entry.oid}"'})
