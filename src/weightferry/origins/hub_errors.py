"""Translates the errors of huggingface_hub into errors of weightferry that say what the user can do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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
from huggingface_hub.utils import hf_raise_for_status

from weightferry.errors import AccessDenied, CollectError, OriginError, SourceNotFound
from weightferry.origins.range_request import status_error
from weightferry.sources import Source


class CheckedSession:
    """A session that raises the Hub's error codes, as huggingface_hub reads them, as errors of weightferry.

    The errors of huggingface_hub are subclasses of the HTTP library's errors, so they are translated before `get_range`
    sees them.
    """

    def __init__(self, session: Any, source: Source, subject: str, token: bool | str | None = None) -> None:
        self._session, self._source, self._subject, self._token = session, source, subject, token

    @contextmanager
    def stream(self, method: str, url: str, **options: Any) -> Iterator[Any]:
        """Send a request, with the arguments of the session's `stream`."""
        with (
            hub_errors(self._source, self._subject, self._token),
            self._session.stream(method, url, **options) as response,
        ):
            if response.status_code >= 400:
                response.read()  # the body may contain the reason
                hf_raise_for_status(response)
            yield response


@contextmanager
def hub_errors(source: Source, subject: str, token: bool | str | None = None) -> Iterator[None]:
    """Raise errors of huggingface_hub as errors of weightferry, with a hint for the user.

    Some are raised ``from None``: their texts contain the signed URL of the content, which a traceback would show.

    Parameters
    ----------
    token
        What the caller said about the token, as in `weightferry.FetchConfig`.
    """
    try:
        yield
    except GatedRepoError as error:
        raise access_denied(error, subject, "gated repository, accept its terms on the Hub; ", token) from None
    except RevisionNotFoundError as error:
        raise SourceNotFound(f"no revision {source.revision or 'main'!r} in the repository", subject=subject) from error
    except EntryNotFoundError:
        raise SourceNotFound("no such file at this commit", subject=subject) from None
    except RepositoryNotFoundError as error:
        if error.response is not None and error.response.status_code == 403:
            raise access_denied(error, subject, token=token) from None
        also = " and no local folder of that name" if source.guessed else ""
        text = f"no such {source.repo_type} on {constants.ENDPOINT}{also}; if it is private: {_token_hint(token)}"
        raise SourceNotFound(text, subject=subject) from error
    except OfflineModeIsEnabled as error:
        raise OriginError("HF_HUB_OFFLINE is set, so no request is sent to the Hub", subject=subject) from error
    except HFValidationError as error:
        raise SourceNotFound(f"not a valid repository id: {error}", subject=subject) from error
    except HfHubHTTPError as error:
        raise _by_status(error, subject, token) from None


def access_denied(
    error: HfHubHTTPError, subject: str, prefix: str = "", token: bool | str | None = None
) -> AccessDenied:
    """Return the error for a token that is missing, or has no access."""
    status = error.response.status_code if error.response is not None else 401
    return AccessDenied(f"HTTP {status}: {prefix}{_token_hint(token)}", subject=subject)


def _by_status(error: HfHubHTTPError, subject: str, token: bool | str | None) -> CollectError:
    response = error.response
    if response.status_code in (401, 403):
        return access_denied(error, subject, token=token)
    return status_error(response.status_code, response.headers, subject, detail=error.server_message or "")


def _token_hint(token: bool | str | None) -> str:
    if token is False:
        return "token of FetchConfig is False, so no token was sent: pass FetchConfig(token=True)"
    if isinstance(token, str):
        return "the token in FetchConfig has no access; pass another one"
    if get_token():
        return "the token of this rank has no access; set another one with HF_TOKEN or `hf auth login`"
    return "this rank has no token: set HF_TOKEN or run `hf auth login`"
