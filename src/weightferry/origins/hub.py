"""The Hugging Face Hub, through huggingface_hub's own session and rules for tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any
from urllib.parse import quote, urljoin, urlsplit

from huggingface_hub import HfApi, constants, get_token, hf_hub_url
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_session, hf_raise_for_status

from weightferry._version import __version__
from weightferry.errors import AccessDenied, CollectError, OriginError, SourceNotFound
from weightferry.hashing import Checksum
from weightferry.manifest import File, Pinned
from weightferry.origins.base import closest, reject_climbing
from weightferry.origins.http import get_range, status_error, timeouts, translated
from weightferry.settings import Settings
from weightferry.sources import Source


class HubOrigin:
    """Repositories of the Hub at ``HF_ENDPOINT``.

    Metadata costs one request a repository: `repo_info` with file metadata gives the commit together with the size and
    the checksum of every file. Only the rank that resolves makes it.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._places: dict[str, str] = {}
        self._api = HfApi(library_name="weightferry", library_version=__version__)

    def resolve(self, source: Source, paths: Sequence[str]) -> Pinned:
        """See `Origin.resolve`."""
        subject = str(source)
        with translated(subject), _hub_errors(source, subject):
            info: Any = self._api.repo_info(
                source.root,
                revision=source.revision,
                repo_type=source.repo_type,
                timeout=self._settings.read_timeout,
                files_metadata=True,
            )
        there = {sibling.rfilename: sibling for sibling in info.siblings or ()}
        wanted = {name for path in paths for name in _below(path, list(there), subject)}
        commit = _hex(info.sha or "", 40, subject)
        return Pinned(source, commit, tuple(_file(s, subject) for name, s in there.items() if name in wanted))

    def reach(self, pinned: Pinned, path: str) -> None:
        """See `Origin.reach`; the Hub's redirect to the content is answer enough."""
        subject = f"{pinned.name}/{path}"
        headers = {**_headers(), "Range": "bytes=0-0"}
        options = {"headers": headers, "timeout": timeouts(self._settings), "follow_redirects": False}
        session = _Checked(get_session(), pinned.source, subject)
        with translated(subject), session.stream("GET", self._url(pinned, path), **options):
            pass

    def _url(self, pinned: Pinned, path: str) -> str:
        # hf_hub_url quotes neither of these two where it should not: `quote` is what its own callers rely on.
        source = pinned.source
        return hf_hub_url(source.root, path, repo_type=source.repo_type, revision=quote(pinned.commit, safe=""))

    @contextmanager
    def read(self, pinned: Pinned, path: str, start: int = 0, stop: int | None = None) -> Iterator[Iterator[bytes]]:
        """See `Origin.read`; the commit is pinned, so the bytes cannot change."""
        subject, url = f"{pinned.name}/{path}", self._url(pinned, path)
        session, timeout = _Checked(get_session(), pinned.source, subject), timeouts(self._settings)
        with ExitStack() as opened:
            response, known = None, self._places.get(url)
            if known:
                # The link is signed, and may be refused by now.
                with suppress(AccessDenied, SourceNotFound):
                    part = get_range(session, known, {}, subject, start, stop, timeout=timeout)
                    response = opened.enter_context(part)
            if response is None:
                place = self._place(session, url, subject) if start or stop is not None else url
                headers = _headers() if place == url else {}
                part = get_range(session, place, headers, subject, start, stop, timeout=timeout)
                response = opened.enter_context(part)
            yield response.iter_raw()

    def _place(self, session: _Checked, url: str, subject: str) -> str:
        """Ask the Hub where the content of a file is; itself, when it sends that.

        It counts requests, and every piece of a file would be one: the link that it answers with is kept. What leads
        elsewhere on the Hub itself needs the token and is left to redirects.
        """
        options = {"timeout": timeouts(self._settings), "follow_redirects": False}
        with (
            translated(subject),
            session.stream("GET", url, headers={**_headers(), "Range": "bytes=0-0"}, **options) as answer,
        ):
            link = str(urljoin(url, answer.headers.get("Location", "")))
        if urlsplit(link).netloc == urlsplit(url).netloc:
            return url
        self._places[url] = link
        return link


def _headers() -> dict[str, str]:
    # Not huggingface_hub's build_hf_headers: in 2.x it may ask the Hub a question of its own first, which every leader
    # of a job would do. Whether a token is sent follows its rule.
    token = None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()
    return {"User-Agent": f"weightferry/{__version__}", **({"Authorization": f"Bearer {token}"} if token else {})}


class _Checked:
    """A session whose responses went through huggingface_hub's own reading of the Hub's error codes.

    Its errors are the HTTP library's too, so they must be ours before `get_range` sees them.
    """

    def __init__(self, session: Any, source: Source, subject: str) -> None:
        self._session, self._source, self._subject = session, source, subject

    @contextmanager
    def stream(self, method: str, url: str, **options: Any) -> Iterator[Any]:
        with self._session.stream(method, url, **options) as response:
            if response.status_code >= 400:
                response.read()  # the reason may stand in the body
                with _hub_errors(self._source, self._subject):
                    hf_raise_for_status(response)
            yield response


def _below(path: str, there: Sequence[str], subject: str) -> list[str]:
    found = [name for name in there if not path or name == path or name.startswith(f"{path}/")]
    if path and not found:
        raise SourceNotFound(f"no file or folder {path!r} there{closest(path, there)}", subject=f"{subject}/{path}")
    return found


def _file(sibling: Any, subject: str) -> File:
    name, lfs = sibling.rfilename, sibling.lfs
    checksum = None
    if lfs is not None:
        checksum = Checksum("sha256", _hex(lfs["sha256"], 64, subject))
    elif sibling.blob_id:
        checksum = Checksum("git-sha1", _hex(sibling.blob_id, 40, subject))
    try:
        return File(name, lfs["size"] if lfs is not None else sibling.size, checksum)
    except ValueError as error:
        raise reject_climbing(name, subject) from error


def _hex(text: str, length: int, subject: str) -> str:
    # It becomes a file or folder name in the cache.
    if len(text) != length or any(c not in "0123456789abcdef" for c in text):
        raise OriginError(f"the Hub published {text!r} as a checksum or commit", subject=subject)
    return text


@contextmanager
def _hub_errors(source: Source, subject: str) -> Iterator[None]:
    """Turn huggingface_hub's errors into ours, with what the user can do about them.

    ``from None``: their texts hold the signed link to the content, and a traceback would show it.
    """
    try:
        yield
    except GatedRepoError as error:
        raise _denied(subject, "gated: accept its terms on the Hub, then ", error) from None
    except RevisionNotFoundError as error:
        raise SourceNotFound(f"no revision {source.revision or 'main'!r} there", subject=subject) from error
    except EntryNotFoundError:
        raise SourceNotFound("no such file at that commit", subject=subject) from None
    except RepositoryNotFoundError as error:
        if error.response is not None and error.response.status_code == 403:
            raise _denied(subject, "", error) from None
        also = " (and no local folder of that name)" if source.guessed else ""
        hint = f"no such {source.repo_type} on {constants.ENDPOINT}{also}, or it is private and {_token_hint()}"
        raise SourceNotFound(hint, subject=subject) from error
    except OfflineModeIsEnabled as error:
        raise OriginError("HF_HUB_OFFLINE is set: the Hub may not be asked", subject=subject) from error
    except HFValidationError as error:
        raise SourceNotFound(f"not a repository id: {error}", subject=subject) from error
    except HfHubHTTPError as error:
        raise _by_status(error, subject) from None


def _by_status(error: HfHubHTTPError, subject: str) -> CollectError:
    response = error.response
    if response.status_code in (401, 403):
        return _denied(subject, "", error)
    return status_error(response.status_code, response.headers, subject, said=error.server_message or "")


def _denied(subject: str, prefix: str, error: HfHubHTTPError) -> AccessDenied:
    status = error.response.status_code if error.response is not None else 401
    return AccessDenied(f"HTTP {status}: {prefix}{_token_hint()}", subject=subject)


def _token_hint() -> str:
    if get_token():
        return "the token of this rank (HF_TOKEN, or `hf auth login`) has no access to it"
    return "this rank has no token: set HF_TOKEN, or run `hf auth login`"
