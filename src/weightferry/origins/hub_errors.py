"""Translates refusals of the Hub into errors of weightferry that say what the user can do."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from huggingface_hub import constants, get_token
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from weightferry.errors import AccessDenied, CollectError, OriginError, SourceNotFound
from weightferry.origins.hub_session import HubClient
from weightferry.origins.range_request import status_error
from weightferry.origins.transport import Response
from weightferry.sources import Source

GATED, NO_REVISION, NO_FILE, NO_REPOSITORY = "GatedRepo", "RevisionNotFound", "EntryNotFound", "RepoNotFound"
"""Values of the header X-Error-Code of the Hub."""
_DISABLED = "Access to this resource is disabled."
_WRONG_TOKEN = "Invalid credentials in Authorization header"  # noqa: S105 a message of the Hub
# By error class of huggingface_hub; a subclass comes before its base.
_CODES: tuple[tuple[type[Exception], str], ...] = (
    (GatedRepoError, GATED),
    (RevisionNotFoundError, NO_REVISION),
    (EntryNotFoundError, NO_FILE),
    (RepositoryNotFoundError, NO_REPOSITORY),
)


@dataclass(frozen=True)
class Refusal:
    """A response of the Hub with a status of 400 or more.

    Attributes
    ----------
    status, headers
        Of the response.
    code
        One of `GATED`, `NO_REVISION`, `NO_FILE`, `NO_REPOSITORY`; empty for any other reason.
    message
        Explanation of the Hub.
    """

    status: int
    headers: Mapping[str, str]
    code: str
    message: str

    @classmethod
    def of(cls, response: Response) -> Refusal:
        """Read a response, as `hf_raise_for_status` of huggingface_hub does."""
        code, message = response.headers.get("X-Error-Code", ""), response.headers.get("X-Error-Message", "")
        if message == _DISABLED or code not in (GATED, NO_REVISION, NO_FILE, NO_REPOSITORY):
            code = ""
        # Without a token the Hub answers 401 for a repository that is private or missing.
        if not code and response.status == 401 and message not in (_DISABLED, _WRONG_TOKEN) and _is_repo_url(response):
            code = NO_REPOSITORY
        return cls(response.status, response.headers, code, _server_message(response))

    def error(self, source: Source, subject: str, token: bool | str | None = None) -> CollectError:
        """Return the error for it, with a hint for the user. `token` is as in `weightferry.FetchConfig`."""
        if self.code == NO_REVISION:
            return SourceNotFound(f"no revision {source.revision or 'main'!r} in the repository", subject=subject)
        if self.code == NO_FILE:
            return SourceNotFound("no such file at this commit", subject=subject)
        if self.code == NO_REPOSITORY and self.status != 403:
            also = " and no local folder of that name" if source.guessed else ""
            text = f"no such {source.repo_type} on {constants.ENDPOINT}{also}; if it is private: {_token_hint(token)}"
            return SourceNotFound(text, subject=subject)
        if self.code or self.status in (401, 403):
            return self.access_denied(subject, token)
        return status_error(self.status, self.headers, subject, detail=self.message)

    def access_denied(self, subject: str, token: bool | str | None = None) -> AccessDenied:
        """Return the error for a token that is missing, or has no access."""
        gated = "gated repository, accept its terms on the Hub; " if self.code == GATED else ""
        return AccessDenied(f"HTTP {self.status}: {gated}{_token_hint(token)}", subject=subject)


class CheckedClient:
    """Sends requests to the Hub for one source, and raises its refusals as errors of weightferry."""

    def __init__(self, client: HubClient, source: Source, token: bool | str | None = None) -> None:
        self._client, self._source, self._token = client, source, token

    @contextmanager
    def stream(self, method: str, url: str, *, subject: str, **options: Any) -> Iterator[Response]:
        """Send a request and yield the response before its body is read; see `HubClient.stream`."""
        with self._client.stream(method, url, subject=subject, **options) as response:
            if response.status >= 400:
                raise Refusal.of(response).error(self._source, subject, self._token)
            yield response


@contextmanager
def hub_errors(source: Source, subject: str, token: bool | str | None = None) -> Iterator[None]:
    """Raise errors of huggingface_hub as errors of weightferry, with a hint for the user.

    `token` is as in `weightferry.FetchConfig`.
    """
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise OriginError("HF_HUB_OFFLINE is set, so no request is sent to the Hub", subject=subject) from error
    except HFValidationError as error:
        raise SourceNotFound(f"not a valid repository id: {error}", subject=subject) from error
    except HfHubHTTPError as error:
        code = next((code for kind, code in _CODES if isinstance(error, kind)), "")
        status, headers = (401, {}) if error.response is None else (error.response.status_code, error.response.headers)
        raise Refusal(status, headers, code, error.server_message or "").error(source, subject, token) from None


def _is_repo_url(response: Response) -> bool:
    parts = urlsplit(response.url)
    return parts.scheme == "https" and (parts.path.startswith("/api/") or "/resolve/" in parts.path)


def _server_message(response: Response) -> str:
    """Return the explanations in the headers and in the body, which is JSON, plain text or a page."""
    texts, body = [response.headers.get("X-Error-Message", "")], response.start_of_body()
    try:
        data = json.loads(body)
    except ValueError:
        is_page = "html" in response.headers.get("Content-Type", "").lower()
        texts += [] if is_page else [body.decode(errors="replace")]
    else:
        error, errors = (data.get("error"), data.get("errors")) if isinstance(data, dict) else (None, None)
        texts += error if isinstance(error, list) else [error or ""]
        texts += [each.get("message", "") for each in errors or () if isinstance(each, dict)]
    return "\n".join(dict.fromkeys(stripped for text in texts if (stripped := str(text).strip())))


def _token_hint(token: bool | str | None) -> str:
    if token is False:
        return "token of FetchConfig is False, so no token was sent: pass FetchConfig(token=True)"
    if isinstance(token, str):
        return "the token in FetchConfig has no access; pass another one"
    if get_token():
        return "the token of this rank has no access; set another one with HF_TOKEN or `hf auth login`"
    return "this rank has no token: set HF_TOKEN or run `hf auth login`"
