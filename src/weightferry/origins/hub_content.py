"""The bytes of files on the Hub: from the Hub itself, or from the signed link to a CDN that it names."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import replace
from functools import partial
from urllib.parse import quote

from huggingface_hub import constants, get_token, hf_hub_url

from weightferry.errors import AccessDenied, OriginError, SourceNotFound
from weightferry.manifest import File
from weightferry.origins.base import TransientOriginError
from weightferry.origins.hub_errors import CheckedClient
from weightferry.origins.hub_session import HubClient
from weightferry.origins.range_request import IDENTITY, RangeRequest, get_range
from weightferry.origins.signed_urls import SignedUrl, SignedUrlCache
from weightferry.origins.transport import Response, same_server
from weightferry.origins.xet import XetFile, XetReader
from weightferry.settings import Settings
from weightferry.sources import Source

logger = logging.getLogger(__name__)

_MAX_REDIRECTS = 5
_HUB_HOME = "https://huggingface.co/"
_XET_LINK = re.compile(r'<([^>]*)>\s*;\s*rel="?xet-auth"?')


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

    def __init__(self, settings: Settings, client: HubClient, token: bool | str | None = None) -> None:
        self._client, self._token = client, token
        self._urls = SignedUrlCache()
        self._xet = XetReader(settings)
        self._use_xet = True

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
                yield stack.enter_context(self._from_hub(source, request)).body
                return
            fetch_url = partial(self._request_signed_url, source, request)
            location = self._urls.get(request.url, fetch_url)
            if location.xet and self._use_xet and self._xet.available and request.start < location.xet.size:
                yield stack.enter_context(closing(self._from_xet(location.xet, source, fetch_url, request)))
            else:
                yield self._open(stack, source, fetch_url, request).body

    def close(self) -> None:
        """Stop reading through Xet; the client stays open."""
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
                yield from self._open(stack, source, fetch_url, replace(request, start=position, stop=stop)).body

    def _open(
        self, stack: ExitStack, source: Source, fetch_url: Callable[[], SignedUrl], request: RangeRequest
    ) -> Response:
        """Open the signed URL; if the CDN refuses it, request a new one, once."""
        location = self._urls.get(request.url, fetch_url)
        try:
            return stack.enter_context(self._from_signed_url(source, location, request))
        except (AccessDenied, SourceNotFound):
            if not location.url:
                raise
        location = self._urls.get(request.url, fetch_url, refused=location)
        return stack.enter_context(self._from_signed_url(source, location, request))

    def _from_hub(self, source: Source, request: RangeRequest) -> AbstractContextManager[Response]:
        return get_range(
            CheckedClient(self._client, source, self._token), replace(request, headers=headers(self._token))
        )

    def _from_signed_url(
        self, source: Source, location: SignedUrl, request: RangeRequest
    ) -> AbstractContextManager[Response]:
        if not location.url:
            return self._from_hub(source, request)
        return get_range(self._client, replace(request, url=location.url))

    def _request_signed_url(self, source: Source, request: RangeRequest) -> SignedUrl:
        """Request the location of the content from the Hub.

        Redirects within the Hub, such as to a renamed repository, are followed. The request is a GET, as for any reader
        of the content, but for a single byte, in case the Hub sends the content itself.
        """
        url, sent_headers = request.url, {**headers(self._token), **IDENTITY, "Range": "bytes=0-0"}
        client = CheckedClient(self._client, source, self._token)
        for _ in range(_MAX_REDIRECTS):
            with client.stream(
                "GET", url, headers=sent_headers, subject=request.subject, follow_redirects=False
            ) as response:
                target = response.redirect
                if not target:
                    return SignedUrl()
                response.start_of_body()  # so that the connection can be used again
                xet = _xet_file(url, response, request.size)
            if not same_server(url, target):
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
    return {"Authorization": f"Bearer {secret}"} if secret else {}


def _xet_file(url: str, response: Response, size: int | None) -> XetFile | None:
    """Return the Xet data of a response; None unless the URL for Xet tokens, which gets our token, is on the Hub."""
    name, link = response.headers.get("X-Xet-Hash"), _XET_LINK.search(response.headers.get("Link", ""))
    token_url = link[1] if link else response.headers.get("X-Xet-Refresh-Route", "")
    if token_url.startswith(_HUB_HOME):  # a mirror may name the Hub that it mirrors
        token_url = f"{constants.ENDPOINT.rstrip('/')}/{token_url.removeprefix(_HUB_HOME)}"
    if not name or not token_url or not size or not same_server(url, token_url):
        return None
    return XetFile(name, size, token_url)
