"""Requests to the Hub: over our own connections, or through the session of huggingface_hub if those do not work.

huggingface_hub sends its requests with requests (0.x), httpx (1.x) or httpx2 (2.x).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from huggingface_hub import constants
from huggingface_hub.utils import get_session
from urllib3.exceptions import NewConnectionError, ReadTimeoutError

from weightferry.errors import OriginError, redact
from weightferry.origins.base import Silent, TransientOriginError, Unreachable
from weightferry.origins.hub_cache import is_offline
from weightferry.origins.transport import USER_AGENT, HttpClient, Response, Timeouts, read_body
from weightferry.settings import Settings

_LIBRARIES = ("requests", "httpx", "httpx2")
# Names of error classes in these libraries.
_UNREACHABLE = {"ConnectError", "ConnectTimeout", "ProxyError", "SSLError"}
_SILENT = {"ReadTimeout"}
_TRANSIENT = {"TransportError", "ConnectionError", "Timeout", "ChunkedEncodingError"}


class HubClient:
    """Sends requests to the Hub and to the servers that it redirects to; see `HttpClient`.

    A program can configure a proxy or certificates with `set_client_factory` or `configure_http_backend` of
    huggingface_hub. Only its session uses them. So if our own connections cannot be made, that session is tried.
    """

    def __init__(self, settings: Settings) -> None:
        self._client, self._timeouts = HttpClient(settings), Timeouts.of(settings)
        self._use_own = True

    @contextmanager
    def stream(
        self, method: str, url: str, *, headers: Mapping[str, str], subject: str, follow_redirects: bool = True
    ) -> Iterator[Response]:
        """See `HttpClient.stream`."""
        if is_offline():
            raise OriginError("HF_HUB_OFFLINE is set, so no request is sent to the Hub", subject=subject)
        options: dict[str, Any] = {"headers": headers, "subject": subject, "follow_redirects": follow_redirects}
        with ExitStack() as stack:
            yield self._open(stack, method, url, options)

    def close(self) -> None:
        """Close the own connections. The session of huggingface_hub stays open, since the process shares it."""
        self._client.close()

    def _open(self, stack: ExitStack, method: str, url: str, options: dict[str, Any]) -> Response:
        if not self._use_own:
            return stack.enter_context(_stream(self._timeouts, method, url, **options))
        try:
            return stack.enter_context(self._client.stream(method, url, **options))
        except Unreachable as unreachable:
            try:
                response = stack.enter_context(_stream(self._timeouts, method, url, **options))
            except Unreachable:
                raise unreachable from unreachable.__cause__
        self._use_own = False
        return response


@contextmanager
def _stream(
    timeouts: Timeouts, method: str, url: str, *, headers: Mapping[str, str], subject: str, follow_redirects: bool
) -> Iterator[Response]:
    """Send a request through the session of huggingface_hub and yield the response before its body is read."""
    session: Any = get_session()
    sent = {"User-Agent": USER_AGENT, **headers}
    connect, read = timeouts.connect, timeouts.read
    with translate_library_errors(subject), ExitStack() as stack:
        if callable(getattr(session, "stream", None)):  # httpx and httpx2; of requests it is a flag
            options = {"follow_redirects": follow_redirects, "timeout": (connect, read, read, None)}
            raw = stack.enter_context(session.stream(method, url, headers=sent, **options))
            yield Response(raw.status_code, raw.headers, str(raw.url), raw.iter_raw())
        else:
            options = {"allow_redirects": follow_redirects, "timeout": (connect, read), "stream": True}
            raw = stack.enter_context(session.request(method, url, headers=sent, **options))
            body = read_body(raw.raw, "the server", timeouts, subject)
            yield Response(raw.status_code, raw.headers, raw.url, body)


@contextmanager
def translate_library_errors(subject: str) -> Iterator[None]:
    """Raise errors of the HTTP library of huggingface_hub as errors of weightferry."""
    try:
        yield
    except Exception as error:
        names = {kind.__name__ for kind in type(error).__mro__ if kind.__module__.partition(".")[0] in _LIBRARIES}
        if not names:
            raise
        cause = _cause(error)
        text = redact(f"{type(error).__name__}: {cause}")
        if names & _UNREACHABLE or isinstance(cause, NewConnectionError):
            raise Unreachable(f"cannot connect to the Hub at {constants.ENDPOINT}: {text}", subject=subject) from error
        if names & _SILENT or isinstance(cause, ReadTimeoutError):
            raise Silent(f"the Hub at {constants.ENDPOINT} does not answer: {text}", subject=subject) from error
        kind = TransientOriginError if names & _TRANSIENT else OriginError
        raise kind(f"the request to the Hub at {constants.ENDPOINT} failed: {text}", subject=subject) from error


def _cause(error: Exception) -> BaseException:
    """Return the error of urllib3 that an error of requests contains, or the error itself."""
    inner = error.args[0] if error.args else error
    inner = getattr(inner, "reason", inner)
    return inner if isinstance(inner, Exception) else error
