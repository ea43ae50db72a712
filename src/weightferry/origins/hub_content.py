"""The bytes of files on the Hub: from the Hub itself, or from the signed link to a CDN that it names."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any
from urllib.parse import quote, urljoin, urlsplit

from huggingface_hub import constants, get_token, hf_hub_url
from huggingface_hub.utils import get_session, parse_xet_file_data_from_response

from weightferry._version import __version__
from weightferry.errors import AccessDenied, OriginError, SourceNotFound
from weightferry.manifest import File
from weightferry.origins.base import TransientOriginError, Unreachable
from weightferry.origins.hub_errors import CheckedSession
from weightferry.origins.range_request import IDENTITY, RangeRequest, get_range, translate_http_errors
from weightferry.origins.signed_urls import SignedUrl, SignedUrlCache
from weightferry.origins.transport import new_client, timeouts
from weightferry.origins.xet import XetFile, XetReader
from weightferry.settings import Settings
from weightferry.sources import Source

logger = logging.getLogger(__name__)

_MOST_REDIRECTS = 5


class HubContent:
    """Reads files, whole or in ranges.

    A large file costs the Hub one request a process and link, however many ranges of it are read: they are read where
    the link leads until it is refused or ends, or through Xet. The token stays with the Hub.
    """

    def __init__(self, settings: Settings) -> None:
        self._options = {"timeout": timeouts(settings)}
        self._client = new_client(settings)
        self._own_route = True
        self._links = SignedUrlCache()
        self._xet = XetReader(settings)
        self._use_xet = self._xet.available

    @contextmanager
    def read(self, source: Source, file: File, wanted: RangeRequest) -> Iterator[Iterator[bytes]]:
        """Open what is `wanted` and yield its bytes; errors as of `get_range`.

        Parameters
        ----------
        wanted
            Its URL is the one at the Hub.
        """
        with ExitStack() as opened:
            if file.checksum is None or file.checksum.algorithm != "sha256":  # only files in LFS are behind links
                yield opened.enter_context(self._from_hub(source, wanted)).iter_raw()
                return
            ask = partial(self._locate, source, wanted)
            link = self._links.get(wanted.url, ask)
            if link.xet and self._use_xet and wanted.start < link.xet.size:
                yield opened.enter_context(closing(self._from_xet(link.xet, source, ask, wanted)))
            else:
                yield self._open(opened, source, ask, wanted).iter_raw()

    def close(self) -> None:
        """Close what is ours; huggingface_hub's session, which the process shares, stays open."""
        self._client.close()
        self._xet.close()

    def _from_xet(
        self, file: XetFile, source: Source, ask: Callable[[], SignedUrl], wanted: RangeRequest
    ) -> Generator[bytes, None, None]:
        """Read through Xet, and what that fails to bring, by the link; nothing is asked of Xet a second time."""
        done, stop = wanted.start, file.size if wanted.stop is None else min(wanted.stop, file.size)
        try:
            for chunk in self._xet.read(file, done, stop, headers(token=True)):
                done += len(chunk)
                yield chunk
        except TransientOriginError as error:
            logger.warning("%s: %s; going on by plain http from byte %d", wanted.subject, error, done)
            self._use_xet = False
        if done < stop:
            with ExitStack() as opened:
                yield from self._open(opened, source, ask, replace(wanted, start=done, stop=stop)).iter_raw()

    def _open(self, opened: ExitStack, source: Source, ask: Callable[[], SignedUrl], wanted: RangeRequest) -> Any:
        """Open the end of the link; one that is refused is asked for anew, once."""
        link = self._links.get(wanted.url, ask)
        try:
            return opened.enter_context(self._from_link(source, link, wanted))
        except (AccessDenied, SourceNotFound):
            if not link.url:
                raise
        link = self._links.get(wanted.url, ask, refused=link)
        return opened.enter_context(self._from_link(source, link, wanted))

    def _from_hub(self, source: Source, wanted: RangeRequest) -> Any:
        session = CheckedSession(get_session(), source, wanted.subject)
        return get_range(session, replace(wanted, headers=headers(token=True)), follow_redirects=True, **self._options)

    @contextmanager
    def _from_link(self, source: Source, link: SignedUrl, wanted: RangeRequest) -> Iterator[Any]:
        if not link.url:
            with self._from_hub(source, wanted) as response:
                yield response
            return
        wanted = replace(wanted, url=link.url, headers=headers(token=False))
        with ExitStack() as opened:
            yield self._by_a_route_that_works(opened, wanted)

    def _by_a_route_that_works(self, opened: ExitStack, wanted: RangeRequest) -> Any:
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

    def _locate(self, source: Source, wanted: RangeRequest) -> SignedUrl:
        """Ask the Hub where the content is; redirects on the Hub itself, as to a repository's new name, are followed.

        With GET, as any reader of the content would ask. Of a Hub that sends the content itself only one byte is read.
        """
        url, asked = wanted.url, {**headers(token=True), **IDENTITY, "Range": "bytes=0-0"}
        session = CheckedSession(get_session(), source, wanted.subject)
        for _ in range(_MOST_REDIRECTS):
            with (
                translate_http_errors(wanted.subject),
                session.stream("GET", url, headers=asked, follow_redirects=False, **self._options) as response,
            ):
                if not response.has_redirect_location:
                    return SignedUrl()
                response.read()  # so that the connection can be used again
                target = urljoin(url, response.headers["Location"])
                xet = _xet_file(url, response, wanted.size)
            if not _same_server(url, target):
                return SignedUrl(target, xet)
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


def _xet_file(url: str, response: Any, size: int | None) -> XetFile | None:
    """What the Hub says of Xet; the token goes along to where it gives those for Xet, so that must be the Hub too."""
    said = parse_xet_file_data_from_response(response, endpoint=constants.ENDPOINT)
    if said is None or not size or not _same_server(url, said.refresh_route):
        return None
    return XetFile(said.file_hash, size, said.refresh_route)


def _same_server(one: str, other: str) -> bool:
    """Whether a redirect stays where it was, an upgrade to https included: the token may go along."""
    a, b = urlsplit(one), urlsplit(other)
    upgraded = (a.scheme, b.scheme) == ("http", "https") and a.port in (None, 80) and b.port in (None, 443)
    return a.hostname == b.hostname and (upgraded or (a.scheme, a.port) == (b.scheme, b.port))
