"""Checks whether a request may see a repository, and makes the Hub's error responses."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from weightferry.testing.hub.commits import Commit
from weightferry.testing.hub.messages import ErrorResponse, Request, Response, error_response, json_response
from weightferry.testing.hub.repositories import Repo, Repositories, RepoType

REPO_TYPES: dict[str, RepoType] = {"models": "model", "datasets": "dataset", "spaces": "space"}

_ANONYMOUS = "Invalid username or password."
_CHALLENGE = 'Bearer realm="Authentication required", charset="UTF-8"'


class Access:
    """Checks the token of a request, and finds the repository that it names.

    Parameters
    ----------
    tokens
        The valid tokens; `HubServer.add_repo` adds more. While the set is empty, every token is valid.
    """

    def __init__(self, repositories: Repositories, tokens: Iterable[str]) -> None:
        self._repositories = repositories
        self.tokens = set(tokens)

    def check_token(self, request: Request) -> str | None:
        """Return the token of a request; None for an anonymous request.

        Raises
        ------
        RefusedError
            401, on every path, if the token is not valid: the Hub does not then treat the request as anonymous.
        """
        token = request.token
        if token is not None and (not token or (self.tokens and token not in self.tokens)):
            raise ErrorResponse(
                error_response(401, "Invalid credentials in Authorization header", WWW_Authenticate=_CHALLENGE)
            )
        return token

    def find_visible(self, request: Request, plural: str, repo_id: str) -> Repo:
        """Return a repository that the request may see; 404 or 401 otherwise."""
        token = self.check_token(request)
        repo = self._repositories.find(REPO_TYPES[plural], repo_id)
        if repo is None or (repo.private and not repo.has_access(token)):
            raise ErrorResponse(_not_found(token))
        return repo

    def find_by_link(self, plural: str, repo_id: str) -> Repo:
        """Return the repository of a signed URL; the server checked the access when it made the URL."""
        repo = self._repositories.find(REPO_TYPES[plural], repo_id)
        if repo is None:
            raise ErrorResponse(_not_found(None))
        return repo

    def find_readable(self, request: Request, plural: str, repo_id: str) -> Repo:
        """Return a repository whose files the request may read."""
        repo = self.find_visible(request, plural, repo_id)
        token = self.check_token(request)
        if repo.gated and not repo.has_access(token):
            raise ErrorResponse(_access_denied(repo, token))
        return repo

    def whoami(self, request: Request) -> Response:
        """Return the user of the token."""
        token = self.check_token(request)
        if token is None:
            return error_response(401, _ANONYMOUS, WWW_Authenticate=_CHALLENGE)
        name: dict[str, Any] = {"type": "user", "id": "0" * 24, "name": "tester", "fullname": "Tester", "orgs": []}
        return json_response({**name, "auth": {"accessToken": {"displayName": "test", "role": "read"}}})


def find_commit(repo: Repo, revision: str) -> Commit:
    """Return the commit of a revision; 404 if there is none."""
    commit = repo.resolve(revision)
    if commit is None:
        raise ErrorResponse(error_response(404, f"Invalid rev id: {revision}", "RevisionNotFound"))
    return commit


def _not_found(token: str | None) -> Response:
    if token is not None:
        return error_response(404, "Repository not found", "RepoNotFound")
    # The real Hub sends no code here: huggingface_hub recognizes this response by its status and the https URL.
    return error_response(401, _ANONYMOUS, "RepoNotFound", WWW_Authenticate=_CHALLENGE)


def _access_denied(repo: Repo, token: str | None) -> Response:
    restricted = f"Access to {repo.type} {repo.id} is restricted"
    if token is None:
        text = f"{restricted}. You must have access to it and be authenticated to access it. Please log in."
        return error_response(401, text, "GatedRepo", WWW_Authenticate=_CHALLENGE)
    listed = f"and you are not in the authorized list. Visit https://huggingface.co/{repo.page} to ask for access."
    return error_response(403, f"{restricted} {listed}", "GatedRepo")
