"""What each path of a Hub server means."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from weightferry.testing.hub import api
from weightferry.testing.hub.access import REPO_TYPES, Access
from weightferry.testing.hub.files import Files
from weightferry.testing.hub.records import Kind
from weightferry.testing.hub.repos import Repo
from weightferry.testing.hub.wire import Answer, RefusedError, Request, error, json_answer
from weightferry.testing.hub.xet import Xet

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Route:
    """What a request is about, and how to answer it.

    Attributes
    ----------
    file
        ``org/name/path`` of the file in question, with ``datasets/`` or ``spaces/`` before it; empty if none.
    """

    kind: Kind
    respond: Callable[[], Answer]
    file: str = ""
    methods: tuple[str, ...] = ("GET", "HEAD")

    def answer(self, request: Request) -> Answer:
        """Answer the request, whatever happens."""
        try:
            if request.method not in self.methods:
                return error(405, "Method not allowed", Allow=", ".join(self.methods))
            return self.respond()
        except RefusedError as refused:
            return refused.answer
        except Exception as bug:  # noqa: BLE001 a thread of a server is where it ends; the client must hear of it
            _log.exception("%s %s", request.method, request.path)
            return error(500, f"the test server failed: {bug!r}")


class Routes:
    """Finds what a request means: on the Hub's own address, or on the one that stands for its CDN."""

    def __init__(self, access: Access, files: Files, xet: Xet | None, page_size: int) -> None:
        self._access = access
        self._files = files
        self._xet = xet
        self._page_size = page_size

    def find(self, request: Request) -> Route:
        """Find the route of a request; unknown paths have one too."""
        found = self._cdn(request) if request.side == "cdn" else self._hub(request)
        return found or Route("other", lambda: error(404, "Sorry, we can't find the page you are looking for."))

    def _hub(self, request: Request) -> Route | None:
        match request.segments:
            case ["api", "whoami-v2"]:
                return Route("metadata", lambda: self._access.whoami(request))
            case ["api", "resolve-cache", plural, org, name, sha, *path] if plural in REPO_TYPES and path:
                return self._small(request, plural, f"{org}/{name}", sha, "/".join(path))
            case ["api", plural, org, name, *rest] if plural in REPO_TYPES:
                return self._api(request, plural, f"{org}/{name}", rest)
            case [("datasets" | "spaces") as plural, org, name, "resolve", revision, *path] if path:
                return self._resolve(request, plural, f"{org}/{name}", revision, "/".join(path))
            case [org, name, "resolve", revision, *path] if path:
                return self._resolve(request, "models", f"{org}/{name}", revision, "/".join(path))
        return None

    def _cdn(self, request: Request) -> Route | None:
        match request.segments:
            case ["repos", plural, org, name, sha, *path] if plural in REPO_TYPES and path:
                return self._large(request, plural, f"{org}/{name}", sha, "/".join(path))
        return self._xet_storage(request, self._xet) if self._xet else None

    def _xet_token(self, request: Request, plural: str, repo_id: str, xet: Xet) -> Route:
        def respond() -> Answer:
            self._access.readable(request, plural, repo_id)
            return xet.token(self._files.cdn_url(request))

        return Route("metadata", respond)

    def _xet_storage(self, request: Request, xet: Xet) -> Route | None:
        match request.segments:
            case ["v1", "reconstructions", name]:
                return Route("metadata", lambda: xet.reconstruction(request, name), xet.path(name))
            case ["xet", name, number]:
                return Route(_content_kind(request), lambda: xet.block(request, name, number), xet.path(name))
        return None

    def _api(self, request: Request, plural: str, repo_id: str, rest: list[str]) -> Route | None:
        def repo() -> Repo:
            return self._access.repo(request, plural, repo_id)

        match rest:
            case []:
                return Route("metadata", lambda: api.info(request, repo()))
            case ["revision", revision]:
                return Route("metadata", lambda: api.info(request, repo(), revision))
            case ["tree", revision, *path]:
                folder = "/".join(path).strip("/")
                return Route("metadata", lambda: api.tree(request, repo(), revision, folder, self._page_size))
            case ["paths-info", revision]:
                return Route("metadata", lambda: api.paths_info(request, repo(), revision), methods=("POST",))
            case ["xet-read-token", _] if self._xet:
                return self._xet_token(request, plural, repo_id, self._xet)
            case ["refs"]:
                return Route("metadata", lambda: api.refs(request, repo()))
            case ["auth-check"]:
                return Route("metadata", lambda: json_answer(self._access.readable(request, plural, repo_id).id))
        return None

    def _resolve(self, request: Request, plural: str, repo_id: str, revision: str, path: str) -> Route:
        def respond() -> Answer:
            return self._files.resolve(request, self._access.readable(request, plural, repo_id), revision, path)

        return Route("metadata" if request.method == "HEAD" else "redirect", respond, _file(plural, repo_id, path))

    def _small(self, request: Request, plural: str, repo_id: str, sha: str, path: str) -> Route:
        def respond() -> Answer:
            return self._files.small(request, self._access.readable(request, plural, repo_id), sha, path)

        return Route(_content_kind(request), respond, _file(plural, repo_id, path))

    def _large(self, request: Request, plural: str, repo_id: str, sha: str, path: str) -> Route:
        def respond() -> Answer:
            return self._files.large(request, self._access.linked(plural, repo_id), sha, path)

        return Route(_content_kind(request), respond, _file(plural, repo_id, path))


def _content_kind(request: Request) -> Kind:
    return "metadata" if request.method == "HEAD" else "content"


def _file(plural: str, repo_id: str, path: str) -> str:
    return f"{repo_id}/{path}" if plural == "models" else f"{plural}/{repo_id}/{path}"
