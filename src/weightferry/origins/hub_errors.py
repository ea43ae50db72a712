"""What the Hub means by its errors, as huggingface_hub reads them, and what the user can do about them."""

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
    """A session whose responses went through huggingface_hub's own reading of the Hub's error codes.

    Its errors are the HTTP library's too, so they must be ours before `get_range` sees them.
    """

    def __init__(self, session: Any, source: Source, subject: str) -> None:
        self._session, self._source, self._subject = session, source, subject

    @contextmanager
    def stream(self, method: str, url: str, **options: Any) -> Iterator[Any]:
        """Send a request, as the session's own `stream`."""
        with hub_errors(self._source, self._subject), self._session.stream(method, url, **options) as response:
            if response.status_code >= 400:
                response.read()  # the reason may stand in the body
                hf_raise_for_status(response)
            yield response


@contextmanager
def hub_errors(source: Source, subject: str) -> Iterator[None]:
    """Turn huggingface_hub's errors into ours, with what the user can do about them.

    ``from None``: their texts hold the signed link to the content, and a traceback would show it.
    """
    try:
        yield
    except GatedRepoError as error:
        raise access_denied(error, subject, "gated: accept its terms on the Hub, then ") from None
    except RevisionNotFoundError as error:
        raise SourceNotFound(f"no revision {source.revision or 'main'!r} there", subject=subject) from error
    except EntryNotFoundError:
        raise SourceNotFound("no such file at that commit", subject=subject) from None
    except RepositoryNotFoundError as error:
        if error.response is not None and error.response.status_code == 403:
            raise access_denied(error, subject) from None
        also = " (and no local folder of that name)" if source.guessed else ""
        hint = f"no such {source.repo_type} on {constants.ENDPOINT}{also}, or it is private and {_token_hint()}"
        raise SourceNotFound(hint, subject=subject) from error
    except OfflineModeIsEnabled as error:
        raise OriginError("HF_HUB_OFFLINE is set: the Hub may not be asked", subject=subject) from error
    except HFValidationError as error:
        raise SourceNotFound(f"not a repository id: {error}", subject=subject) from error
    except HfHubHTTPError as error:
        raise _by_status(error, subject) from None


def access_denied(error: HfHubHTTPError, subject: str, prefix: str = "") -> AccessDenied:
    """Make the error for a token that is missing, or of no use."""
    status = error.response.status_code if error.response is not None else 401
    return AccessDenied(f"HTTP {status}: {prefix}{_token_hint()}", subject=subject)


def _by_status(error: HfHubHTTPError, subject: str) -> CollectError:
    response = error.response
    if response.status_code in (401, 403):
        return access_denied(error, subject)
    return status_error(response.status_code, response.headers, subject, said=error.server_message or "")


def _token_hint() -> str:
    if get_token():
        return "the token of this rank (HF_TOKEN, or `hf auth login`) has no access to it"
    return "this rank has no token: set HF_TOKEN, or run `hf auth login`"
