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

_MAX_REDIRECTS = 5


class HubContent:
    """Reads files or ranges of them.

    For a large file, a process sends one request to the Hub for each signed URL, regardless of the number of ranges.
    The ranges are read from the signed URL until the CDN refuses it or it expires, or through Xet. The token is sent
    only to the Hub.

    Parameters
    ----------
    token
        As in `weightferry.FetchConfig`.
    """

    def __init__(self, settings: Settings, token: bool | str | None = None) -> None:
        self._token = token
        self._options = {"timeout": timeouts(settings)}
        self._client = new_client(settings)
        self._use_own_client = True
        self._urls = SignedUrlCache()
        self._xet = XetReader(settings)
        self._use_xet = self._xet.available

    @contextmanager
    def read(self, source: Source, file: File, request: RangeRequest) -> Iterator[Iterator[bytes]]:
        """Open a range of a file and yield its bytes; raises the errors of `get_range`.

        Parameters
        ----------
        request
            The request, with the URL at the Hub.
        """
        with ExitStack() as stack:
            if file.checksum is None or file.checksum.algorithm != "sha256":  # only LFS files have signed URLs
                yield stack.enter_context(self._from_hub(source, request)).iter_raw()
                return
            fetch_url = partial(self._request_signed_url, source, request)
            location = self._urls.get(request.url, fetch_url)
            if location.xet and self._use_xet and request.start < location.xet.size:
                yield stack.enter_context(closing(self._from_xet(location.xet, source, fetch_url, request)))
            else:
                yield self._open(stack, source, fetch_url, request).iter_raw()

    def close(self) -> None:
        """Close the own connections; the session of huggingface_hub stays open, since the process shares it."""
        self._client.close()
        self._xet.close()

    def _from_xet(
        self, file: XetFile, source: Source, fetch_url: Callable[[], SignedUrl], request: RangeRequest
    ) -> Generator[bytes, None, None]:
        """Read through Xet; if that fails, read the rest from the signed URL, and do not use Xet again."""
        position, stop = request.start, file.size if request.stop is None else min(request.stop, file.size)
        try:
            for chunk in self._xet.read(file, position, stop, headers(self._token)):
                position += len(chunk)
                yield chunk
        except TransientOriginError as error:
            logger.warning("%s: %s; continuing over plain HTTP from byte %d", request.subject, error, position)
            self._use_xet = False
        if position < stop:
            with ExitStack() as stack:
                yield from self._open(stack, source, fetch_url, replace(request, start=position, stop=stop)).iter_raw()

    def _open(self, stack: ExitStack, source: Source, fetch_url: Callable[[], SignedUrl], request: RangeRequest) -> Any:
        """Open the signed URL; if the CDN refuses it, request a new one, once."""
        location = self._urls.get(request.url, fetch_url)
        try:
            return stack.enter_context(self._from_signed_url(source, location, request))
        except (AccessDenied, SourceNotFound):
            if not location.url:
                raise
        location = self._urls.get(request.url, fetch_url, refused=location)
        return stack.enter_context(self._from_signed_url(source, location, request))

    def _from_hub(self, source: Source, request: RangeRequest) -> Any:
        session = CheckedSession(get_session(), source, request.subject, self._token)
        return get_range(
            session, replace(request, headers=headers(self._token)), follow_redirects=True, **self._options
        )

    @contextmanager
    def _from_signed_url(self, source: Source, location: SignedUrl, request: RangeRequest) -> Iterator[Any]:
        if not location.url:
            with self._from_hub(source, request) as response:
                yield response
            return
        request = replace(request, url=location.url, headers=headers(False))
        with ExitStack() as stack:
            yield self._open_with_fallback(stack, request)

    def _open_with_fallback(self, stack: ExitStack, request: RangeRequest) -> Any:
        if self._use_own_client:
            try:
                return stack.enter_context(get_range(self._client, request))
            except Unreachable:
                # A program can configure a proxy or certificates with `set_client_factory` of huggingface_hub. Only the
                # session of huggingface_hub uses them.
                pass
        response = stack.enter_context(get_range(get_session(), request, follow_redirects=True, **self._options))
        self._use_own_client = False
        return response

    def _request_signed_url(self, source: Source, request: RangeRequest) -> SignedUrl:
        """Request the location of the content from the Hub.

        Redirects within the Hub, such as to a renamed repository, are followed. The request is a GET, as for any reader
        of the content, but for a single byte, in case the Hub sends the content itself.
        """
        url, sent_headers = request.url, {**headers(self._token), **IDENTITY, "Range": "bytes=0-0"}
        session = CheckedSession(get_session(), source, request.subject, self._token)
        for _ in range(_MAX_REDIRECTS):
            with (
                translate_http_errors(request.subject),
                session.stream("GET", url, headers=sent_headers, follow_redirects=False, **self._options) as response,
            ):
                if not response.has_redirect_location:
                    return SignedUrl()
                response.read()  # so that the connection can be reused
                target = urljoin(url, response.headers["Location"])
                xet = _xet_file(url, response, request.size)
            if not _same_server(url, target):
                return SignedUrl(target, xet)
            url = target
        raise OriginError(f"the Hub answered with more than {_MAX_REDIRECTS} redirects", subject=request.subject)


def content_url(source: Source, revision: str, path: str) -> str:
    """Return the URL of a file on the Hub."""
    # hf_hub_url quotes path and revision itself; `quote` changes nothing in a commit or a plain branch name.
    return hf_hub_url(source.root, path, repo_type=source.repo_type, revision=quote(revision, safe=""))


def find_token(token: bool | str | None) -> str | None:
    """Return the token to send to the Hub; None for no token. `token` is as in `weightferry.FetchConfig`."""
    if isinstance(token, str):
        return token
    if token is None:
        token = not constants.HF_HUB_DISABLE_IMPLICIT_TOKEN
    return get_token() if token else None


def headers(token: bool | str | None) -> dict[str, str]:
    """Return the headers of a request; `token` is as in `weightferry.FetchConfig`."""
    # This does not use huggingface_hub's build_hf_headers: in 2.x it may first send its own request to the Hub, and
    # every leader of a job would do so. The rule when a token is sent is the same.
    secret = find_token(token)
    return {"User-Agent": f"weightferry/{__version__}", **({"Authorization": f"Bearer {secret}"} if secret else {})}


def _xet_file(url: str, response: Any, size: int | None) -> XetFile | None:
    """Return the Xet data of a response; None unless the URL for Xet tokens, which gets our token, is on the Hub."""
    data = parse_xet_file_data_from_response(response, endpoint=constants.ENDPOINT)
    if data is None or not size or not _same_server(url, data.refresh_route):
        return None
    return XetFile(data.file_hash, size, data.refresh_route)


def _same_server(url: str, target: str) -> bool:
    """Return whether a redirect stays on its server, or only upgrades to https: then it may get the token."""
    a, b = urlsplit(url), urlsplit(target)
    upgraded = (a.scheme, b.scheme) == ("http", "https") and a.port in (None, 80) and b.port in (None, 443)
    return a.hostname == b.hostname and (upgraded or (a.scheme, a.port) == (b.scheme, b.port))
