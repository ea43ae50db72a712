"""The Hugging Face Hub, through huggingface_hub's own session and rules for tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import get_session, hf_raise_for_status

from weightferry._version import __version__
from weightferry.errors import OriginError, SourceNotFound
from weightferry.hashing import Checksum
from weightferry.manifest import File, PinnedSource
from weightferry.origins.base import Unreachable, is_below, path_outside_source, suggest_similar
from weightferry.origins.hub_cache import is_offline
from weightferry.origins.hub_content import HubContent, content_url, headers
from weightferry.origins.hub_errors import access_denied, hub_errors
from weightferry.origins.range_request import RangeRequest, translate_http_errors
from weightferry.origins.transport import timeouts
from weightferry.settings import Settings
from weightferry.sources import Source


class HubOrigin:
    """Repositories of the Hub at ``HF_ENDPOINT``.

    Metadata costs one request a repository: `repo_info` with file metadata gives the commit together with the size and
    the checksum of every file. Only the rank that resolves makes it.
    """

    def __init__(self, settings: Settings) -> None:
        self._timeouts = timeouts(settings)
        self._read_timeout = settings.read_timeout
        self._api = HfApi(library_name="weightferry", library_version=__version__)
        self._content = HubContent(settings)

    def resolve(self, source: Source, paths: Sequence[str]) -> PinnedSource:
        """See `Origin.resolve`."""
        subject = str(source)
        with translate_http_errors(subject), hub_errors(source, subject):
            info: Any = self._api.repo_info(
                source.root,
                revision=source.revision,
                repo_type=source.repo_type,
                timeout=self._read_timeout,
                files_metadata=True,
            )
        there = {sibling.rfilename: sibling for sibling in info.siblings or ()}
        wanted = {name for path in paths for name in _below(path, list(there), subject)}
        commit = _hex(info.sha or "", 40, subject)
        return PinnedSource(source, commit, tuple(_file(s, subject) for name, s in there.items() if name in wanted))

    @contextmanager
    def read(
        self, pinned: PinnedSource, path: str, start: int = 0, stop: int | None = None
    ) -> Iterator[Iterator[bytes]]:
        """See `Origin.read`; the commit is pinned, so the bytes cannot change."""
        file = pinned.file(path)
        url = content_url(pinned.source, pinned.commit, path)
        wanted = RangeRequest(url, f"{pinned.name}/{path}", start, stop, size=file.size)
        with self._content.read(pinned.source, file, wanted) as chunks:
            yield chunks

    def check_access(self, source: Source) -> None:
        """See `Origin.check_access`; a file that is not there tells as much as one that is: the Hub looks at rights first."""
        subject = str(source)
        if is_offline():
            raise Unreachable("HF_HUB_OFFLINE is set", subject=subject)
        url = content_url(source, source.revision or constants.DEFAULT_REVISION, source.path or ".gitattributes")
        options = {"headers": headers(token=True), "follow_redirects": False, "timeout": self._timeouts}
        with (
            translate_http_errors(subject),
            hub_errors(source, subject),
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
                # Who has pinned it knows that it exists: without a token the Hub does not say so.
                if response.status_code == 401:
                    raise access_denied(error, subject) from None
                raise

    def close(self) -> None:
        """See `Origin.close`."""
        self._content.close()


def _below(path: str, there: Sequence[str], subject: str) -> list[str]:
    found = [name for name in there if is_below(name, path)]
    if path and not found:
        raise SourceNotFound(
            f"no file or folder {path!r} there{suggest_similar(path, there)}", subject=f"{subject}/{path}"
        )
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
        raise path_outside_source(name, subject) from error


def _hex(text: str, length: int, subject: str) -> str:
    # It becomes a file or folder name in the cache.
    if len(text) != length or any(c not in "0123456789abcdef" for c in text):
        raise OriginError(f"the Hub published {text!r} as a checksum or commit", subject=subject)
    return text
