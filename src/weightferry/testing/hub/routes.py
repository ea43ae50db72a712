"""Finds the function that answers a request, by its path."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from weightferry.testing.hub import metadata_api
from weightferry.testing.hub.access import REPO_TYPES, Access
from weightferry.testing.hub.files import Files
from weightferry.testing.hub.messages import ErrorResponse, Request, Response, error_response, json_response
from weightferry.testing.hub.repositories import Repo
from weightferry.testing.hub.request_log import Kind
from weightferry.testing.hub.xet import Xet

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Route:
    """The kind of a request, and the function that answers it.

    Attributes
    ----------
    handler
        Returns the response, or raises `ErrorResponse`.
    file
        The requested file as ``org/name/path``, with ``datasets/`` or ``spaces/`` before it; empty if none.
    """

    kind: Kind
    handler: Callable[[], Response]
    file: str = ""
    methods: tuple[str, ...] = ("GET", "HEAD")

    def respond(self, request: Request) -> Response:
        """Return the response; an error response if the handler fails."""
        try:
            if request.method not in self.methods:
                return error_response(405, "Method not allowed", Allow=", ".join(self.methods))
            return self.handler()
        except ErrorResponse as error:
            return error.response
        except Exception as error:  # noqa: BLE001 -- the client must get a response
            _log.exception("%s %s", request.method, request.path)
            return error_response(500, f"the test server failed: {error!r}")


class Routes:
    """Finds the route of a request to the Hub's address or to the CDN's address."""

    def __init__(self, access: Access, files: Files, xet: Xet | None, page_size: int) -> None:
        self._access = access
        self._files = files
        self._xet = xet
        self._page_size = page_size

    def find(self, request: Request) -> Route:
        """Return the route of a request; an unknown path has one too."""
        route = self._cdn(request) if request.side == "cdn" else self._hub(request)
        return route or Route(
            "other", lambda: error_response(404, "Sorry, we can't find the page you are looking for.")
        )

    def _hub(self, request: Request) -> Route | None:
        match request.segments:
            case ["api", "whoami-v2"]:
                return Route("metadata", lambda: self._access.whoami(request))
            case ["api", "resolve-cache", plural, org, name, sha, *path] if plural in REPO_TYPES and path:
                return self._git_file(request, plural, f"{org}/{name}", sha, "/".join(path))
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
                return self._lfs_file(request, plural, f"{org}/{name}", sha, "/".join(path))
        return self._xet_storage(request, self._xet) if self._xet else None

    def _xet_token(self, request: Request, plural: str, repo_id: str, xet: Xet) -> Route:
        def handler() -> Response:
            self._access.find_readable(request, plural, repo_id)
            return xet.token(self._files.cdn_url(request))

        return Route("metadata", handler)

    def _xet_storage(self, request: Request, xet: Xet) -> Route | None:
        match request.segments:
            case ["v1", "reconstructions", name]:
                return Route("metadata", lambda: xet.reconstruction(request, name), xet.path(name))
            case ["xet", name, number]:
                return Route(_content_kind(request), lambda: xet.block(request, name, number), xet.path(name))
        return None

    def _api(self, request: Request, plural: str, repo_id: str, rest: list[str]) -> Route | None:
        def repo() -> Repo:
            return self._access.find_visible(request, plural, repo_id)

        match rest:
            case []:
                return Route("metadata", lambda: metadata_api.info(request, repo()))
            case ["revision", revision]:
                return Route("metadata", lambda: metadata_api.info(request, repo(), revision))
            case ["tree", revision, *path]:
                folder = "/".join(path).strip("/")
                return Route("metadata", lambda: metadata_api.tree(request, repo(), revision, folder, self._page_size))
            case ["paths-info", revision]:
                return Route("metadata", lambda: metadata_api.paths_info(request, repo(), revision), methods=("POST",))
            case ["xet-read-token", _] if self._xet:
                return self._xet_token(request, plural, repo_id, self._xet)
            case ["refs"]:
                return Route("metadata", lambda: metadata_api.refs(request, repo()))
            case ["auth-check"]:
                return Route("metadata", lambda: json_response(self._access.find_readable(request, plural, repo_id).id))
        return None

    def _resolve(self, request: Request, plural: str, repo_id: str, revision: str, path: str) -> Route:
        def handler() -> Response:
            return self._files.resolve(request, self._access.find_readable(request, plural, repo_id), revision, path)

        return Route("metadata" if request.method == "HEAD" else "redirect", handler, _file_name(plural, repo_id, path))

    def _git_file(self, request: Request, plural: str, repo_id: str, sha: str, path: str) -> Route:
        def handler() -> Response:
            return self._files.git_file(request, self._access.find_readable(request, plural, repo_id), sha, path)

        return Route(_content_kind(request), handler, _file_name(plural, repo_id, path))

    def _lfs_file(self, request: Request, plural: str, repo_id: str, sha: str, path: str) -> Route:
        def handler() -> Response:
            return self._files.lfs_file(request, self._access.find_by_link(plural, repo_id), sha, path)

        return Route(_content_kind(request), handler, _file_name(plural, repo_id, path))


def _content_kind(request: Request) -> Kind:
    return "metadata" if request.method == "HEAD" else "content"


def _file_name(plural: str, repo_id: str, path: str) -> str:
    return f"{repo_id}/{path}" if plural == "models" else f"{plural}/{repo_id}/{path}"
