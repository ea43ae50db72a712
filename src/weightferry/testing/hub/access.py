"""Who may see what on a Hub server, and how the Hub says no."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from weightferry.testing.hub.commits import Commit
from weightferry.testing.hub.repos import Repo, Repositories, RepoType
from weightferry.testing.hub.wire import Answer, RefusedError, Request, error, json_answer

REPO_TYPES: dict[str, RepoType] = {"models": "model", "datasets": "dataset", "spaces": "space"}

_ANONYMOUS = "Invalid username or password."
_CHALLENGE = 'Bearer realm="Authentication required", charset="UTF-8"'


class Access:
    """Checks tokens and finds repositories.

    Parameters
    ----------
    tokens
        The valid ones; more may be added. While there are none, every token is valid.
    """

    def __init__(self, repositories: Repositories, tokens: Iterable[str]) -> None:
        self._repositories = repositories
        self.tokens = set(tokens)

    def token(self, request: Request) -> str | None:
        """Return the token of a request, None for an anonymous one.

        Raises
        ------
        RefusedError
            With 401, on every path, if the token is not valid: the Hub does not fall back to what is public.
        """
        token = request.token
        if token is not None and (not token or (self.tokens and token not in self.tokens)):
            raise RefusedError(error(401, "Invalid credentials in Authorization header", WWW_Authenticate=_CHALLENGE))
        return token

    def repo(self, request: Request, plural: str, repo_id: str) -> Repo:
        """Find a repository that the request may see."""
        token = self.token(request)
        repo = self._repositories.find(REPO_TYPES[plural], repo_id)
        if repo is None or (repo.private and not repo.admits(token)):
            raise RefusedError(_missing(token))
        return repo

    def linked(self, plural: str, repo_id: str) -> Repo:
        """Find a repository for the holder of a link: what they may see was checked when the link was made."""
        repo = self._repositories.find(REPO_TYPES[plural], repo_id)
        if repo is None:
            raise RefusedError(_missing(None))
        return repo

    def readable(self, request: Request, plural: str, repo_id: str) -> Repo:
        """Find a repository whose files the request may read."""
        repo = self.repo(request, plural, repo_id)
        token = self.token(request)
        if repo.gated and not repo.admits(token):
            raise RefusedError(_gated(repo, token))
        return repo

    def whoami(self, request: Request) -> Answer:
        """Tell a token whose it is."""
        token = self.token(request)
        if token is None:
            return error(401, _ANONYMOUS, WWW_Authenticate=_CHALLENGE)
        name: dict[str, Any] = {"type": "user", "id": "0" * 24, "name": "tester", "fullname": "Tester", "orgs": []}
        return json_answer({**name, "auth": {"accessToken": {"displayName": "test", "role": "read"}}})


def commit_of(repo: Repo, revision: str) -> Commit:
    """Find a revision."""
    commit = repo.resolve(revision)
    if commit is None:
        raise RefusedError(error(404, f"Invalid rev id: {revision}", "RevisionNotFound"))
    return commit


def _missing(token: str | None) -> Answer:
    if token is not None:
        return error(404, "Repository not found", "RepoNotFound")
    # The real Hub sends no code here: huggingface_hub knows this answer by its status and an https URL. Ours is http.
    return error(401, _ANONYMOUS, "RepoNotFound", WWW_Authenticate=_CHALLENGE)


def _gated(repo: Repo, token: str | None) -> Answer:
    restricted = f"Access to {repo.type} {repo.id} is restricted"
    if token is None:
        text = f"{restricted}. You must have access to it and be authenticated to access it. Please log in."
        return error(401, text, "GatedRepo", WWW_Authenticate=_CHALLENGE)
    listed = f"and you are not in the authorized list. Visit https://huggingface.co/{repo.page} to ask for access."
    return error(403, f"{restricted} {listed}", "GatedRepo")
