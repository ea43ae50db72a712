"""The bytes of files on the Hub: from the Hub itself, or from the signed link to a CDN that it names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any
from urllib.parse import quote, urljoin, urlsplit

from huggingface_hub import constants, get_token, hf_hub_url
from huggingface_hub.utils import get_session

from weightferry._version import __version__
from weightferry.errors import AccessDenied, OriginError, SourceNotFound
from weightferry.manifest import File
from weightferry.origins.base import Unreachable
from weightferry.origins.hub_errors import Checked
from weightferry.origins.links import Link, Links
from weightferry.origins.ranged import IDENTITY, Wanted, get_range, translated
from weightferry.origins.transport import new_client, timeouts
from weightferry.settings import Settings
from weightferry.sources import Source

_MOST_REDIRECTS = 5


class HubContent:
    """Opens files, whole or in ranges.

    A large file costs the Hub one request a process and link, however many ranges of it are read: they are read where
    the link leads until it is refused or ends. The token stays with the Hub.
    """

    def __init__(self, settings: Settings) -> None:
        self._options = {"timeout": timeouts(settings)}
        self._client = new_client(settings)
        self._own_route = True
        self._links = Links()

    @contextmanager
    def open(self, source: Source, file: File, wanted: Wanted) -> Iterator[Any]:
        """Open what is `wanted` and yield the response, its body not yet read; errors as of `get_range`.

        Parameters
        ----------
        wanted
            Its URL is the one at the Hub.
        """
        with ExitStack() as opened:
            yield self._open(opened, source, file, wanted)

    def close(self) -> None:
        """Close what is ours; huggingface_hub's session, which the process shares, stays open."""
        self._client.close()

    def _open(self, opened: ExitStack, source: Source, file: File, wanted: Wanted) -> Any:
        if file.checksum is None or file.checksum.algorithm != "sha256":  # only files in LFS are behind links
            return opened.enter_context(self._from_hub(source, wanted))
        ask = partial(self._locate, source, wanted)
        link = self._links.get(wanted.url, ask)
        try:
            return opened.enter_context(self._from_link(source, link, wanted))
        except (AccessDenied, SourceNotFound):
            if not link.url:
                raise
        link = self._links.get(wanted.url, ask, refused=link)
        return opened.enter_context(self._from_link(source, link, wanted))

    def _from_hub(self, source: Source, wanted: Wanted) -> Any:
        session = Checked(get_session(), source, wanted.subject)
        return get_range(session, replace(wanted, headers=headers(token=True)), follow_redirects=True, **self._options)

    @contextmanager
    def _from_link(self, source: Source, link: Link, wanted: Wanted) -> Iterator[Any]:
        if not link.url:
            with self._from_hub(source, wanted) as response:
                yield response
            return
        wanted = replace(wanted, url=link.url, headers=headers(token=False))
        with ExitStack() as opened:
            yield self._by_a_route_that_works(opened, wanted)

    def _by_a_route_that_works(self, opened: ExitStack, wanted: Wanted) -> Any:
        if self._own_route:
            try:
                return opened.enter_context(get_range(self._client, wanted))
            except Unreachable:
                # A program may have taught huggingface_hub (`set_client_factory`) about a proxy or certificates, and
                # only its session knows of them.
                pass
        response = opened.enter_context(get_range(get_session(), wanted, follow_redirects=True, **self._options))
        self._own_route = False
        return response

    def _locate(self, source: Source, wanted: Wanted) -> Link:
        """Ask the Hub where the content is; redirects on the Hub itself, as to a repository's new name, are followed.

        With GET, as any reader of the content would ask. Of a Hub that sends the content itself only one byte is read.
        """
        url, asked = wanted.url, {**headers(token=True), **IDENTITY, "Range": "bytes=0-0"}
        session = Checked(get_session(), source, wanted.subject)
        for _ in range(_MOST_REDIRECTS):
            with (
                translated(wanted.subject),
                session.stream("GET", url, headers=asked, follow_redirects=False, **self._options) as response,
            ):
                if not response.has_redirect_location:
                    return Link()
                response.read()  # so that the connection can be used again
                target = urljoin(url, response.headers["Location"])
            if not _same_server(url, target):
                return Link(target)
            url = target
        raise OriginError(f"more than {_MOST_REDIRECTS} redirects", subject=wanted.subject)


def content_url(source: Source, revision: str, path: str) -> str:
    """Where the Hub answers for a file."""
    # hf_hub_url quotes neither of these two where it should not: `quote` is what its own callers rely on.
    return hf_hub_url(source.root, path, repo_type=source.repo_type, revision=quote(revision, safe=""))


def headers(*, token: bool) -> dict[str, str]:
    """Make the headers of a request, for the Hub with the token of this rank if it has one."""
    # Not huggingface_hub's build_hf_headers: in 2.x it may ask the Hub a question of its own first, which every leader
    # of a job would do. Whether a token is sent follows its rule.
    secret = get_token() if token and not constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else None
    return {"User-Agent": f"weightferry/{__version__}", **({"Authorization": f"Bearer {secret}"} if secret else {})}


def _same_server(one: str, other: str) -> bool:
    """Whether a redirect stays where it was, an upgrade to https included: the token may go along."""
    a, b = urlsplit(one), urlsplit(other)
    upgraded = (a.scheme, b.scheme) == ("http", "https") and a.port in (None, 80) and b.port in (None, 443)
    return a.hostname == b.hostname and (upgraded or (a.scheme, a.port) == (b.scheme, b.port))
