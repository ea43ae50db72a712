"""The Hugging Face Hub, through the session and the token rules of huggingface_hub."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import get_session, hf_raise_for_status

from weightferry._version import __version__
from weightferry.errors import OriginError
from weightferry.hashing import Checksum
from weightferry.manifest import File, PinnedSource
from weightferry.origins.base import Unreachable, path_outside_source, select_below
from weightferry.origins.hub_cache import is_offline
from weightferry.origins.hub_content import HubContent, content_url, find_token, headers
from weightferry.origins.hub_errors import access_denied, hub_errors
from weightferry.origins.range_request import RangeRequest, translate_http_errors
from weightferry.origins.transport import timeouts
from weightferry.settings import Settings
from weightferry.sources import Source


class HubOrigin:
    """Reads repositories of the Hub at ``HF_ENDPOINT``.

    Metadata costs one request for each repository: `repo_info` with file metadata returns the commit, and the size and
    checksum of every file. Only the rank that resolves sends it.

    Parameters
    ----------
    settings
        Timeouts.
    token
        As in `weightferry.FetchConfig`.
    """

    def __init__(self, settings: Settings, token: bool | str | None = None) -> None:
        self._timeouts, self._token = timeouts(settings), token
        self._read_timeout = settings.read_timeout
        # False: without a token. None would be a token of this rank.
        secret = None if token is None else find_token(token) or False
        self._api = HfApi(token=secret, library_name="weightferry", library_version=__version__)
        self._content = HubContent(settings, token)
        get_session()  # takes a good part of a second, which must not count as time of the first request

    def resolve(self, source: Source, paths: Sequence[str]) -> PinnedSource:
        """See `Origin.resolve`."""
        subject = str(source)
        with translate_http_errors(subject), hub_errors(source, subject, self._token):
            info: Any = self._api.repo_info(
                source.root,
                revision=source.revision,
                repo_type=source.repo_type,
                timeout=self._read_timeout,
                files_metadata=True,
            )
        siblings = {sibling.rfilename: sibling for sibling in info.siblings or ()}
        selected = {name for path in paths for name in select_below(path, list(siblings), subject)}
        commit = _check_hex(info.sha or "", 40, subject)
        files = tuple(_to_file(sibling, subject) for name, sibling in siblings.items() if name in selected)
        return PinnedSource(source, commit, files)

    def find_commit(self, source: Source, timeout: float) -> str:
        """Look up the current commit of a branch or tag with one small request, whatever the number of files.

        Parameters
        ----------
        timeout
            Seconds for a connection, and again for the answer.

        Raises
        ------
        SourceNotFound, AccessDenied, OriginError
        """
        subject, only_the_commit = str(source), dict[str, Any](expand=["sha"])
        with translate_http_errors(subject), hub_errors(source, subject, self._token):
            info: Any = self._api.repo_info(
                source.root, revision=source.revision, repo_type=source.repo_type, timeout=timeout, **only_the_commit
            )
        return _check_hex(info.sha or "", 40, subject)

    @contextmanager
    def read(
        self, pinned: PinnedSource, path: str, start: int = 0, stop: int | None = None
    ) -> Iterator[Iterator[bytes]]:
        """See `Origin.read`. The commit is pinned, so the bytes cannot change."""
        file = pinned.file(path)
        url = content_url(pinned.source, pinned.commit, path)
        request = RangeRequest(url, f"{pinned.name}/{path}", start, stop, size=file.size)
        with self._content.read(pinned.source, file, request) as chunks:
            yield chunks

    def check_access(self, source: Source) -> None:
        """See `Origin.check_access`.

        A missing file passes the check: the Hub checks permissions before it looks for the file.
        """
        subject = str(source)
        if is_offline():
            raise Unreachable("HF_HUB_OFFLINE is set, so no request is sent to the Hub", subject=subject)
        url = content_url(source, source.revision or constants.DEFAULT_REVISION, source.path or ".gitattributes")
        options = {"headers": headers(self._token), "follow_redirects": False, "timeout": self._timeouts}
        with (
            translate_http_errors(subject),
            hub_errors(source, subject, self._token),
            get_session().stream("GET", url, **options) as response,
        ):
            if response.status_code < 400:
                return
            response.read()
            try:
                hf_raise_for_status(response)
            except (EntryNotFoundError, RevisionNotFoundError):
                return
            except RepositoryNotFoundError as error:
                # The source was resolved, so the repository exists; without a token the Hub denies that with HTTP 401.
                if response.status_code == 401:
                    raise access_denied(error, subject, token=self._token) from None
                raise

    def close(self) -> None:
        """See `Origin.close`."""
        self._content.close()


def _to_file(sibling: Any, subject: str) -> File:
    name, lfs = sibling.rfilename, sibling.lfs
    checksum = None
    if lfs is not None:
        checksum = Checksum("sha256", _check_hex(lfs["sha256"], 64, subject))
    elif sibling.blob_id:
        checksum = Checksum("git-sha1", _check_hex(sibling.blob_id, 40, subject))
    try:
        return File(name, lfs["size"] if lfs is not None else sibling.size, checksum)
    except ValueError as error:
        raise path_outside_source(name, subject) from error


def _check_hex(text: str, length: int, subject: str) -> str:
    # The text becomes a file or folder name in the cache.
    if len(text) != length or any(c not in "0123456789abcdef" for c in text):
        raise OriginError(
            f"the Hub answered with {text!r} where a commit or checksum of {length} hexadecimal digits must be",
            subject=subject,
        )
    return text
