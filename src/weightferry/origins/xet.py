"""Reads Hub files through Xet, the chunk storage of the Hub, if `hf_xet` is installed and not disabled."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from importlib import import_module
from typing import Any

from huggingface_hub import constants

from weightferry.errors import redact
from weightferry.origins.base import TransientOriginError
from weightferry.origins.transport import USER_AGENT, Timeouts
from weightferry.settings import Settings

_WINDOW = 64 << 20
"""Bytes of one stream: a stream reads ahead of its reader, up to the end of the requested range."""


@dataclass(frozen=True)
class XetFile:
    """A Hub file that is stored in Xet.

    Attributes
    ----------
    name
        Hash of the file in Xet, in hexadecimal.
    size
        Bytes.
    token_url
        URL at which the Hub returns tokens for Xet.
    """

    name: str
    size: int
    token_url: str


class XetReader:
    """Reads ranges of files, with one token and one connection pool for each repository.

    `hf_xet` retries by itself. It is configured for a single attempt, since plain HTTP can read the same bytes.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._session: Any = None
        self._groups: dict[str, Any] = {}

    @cached_property
    def _hf_xet(self) -> Any:
        """The module, imported for the first file in Xet: it starts threads, and takes 0.1 s."""
        return _module()

    @property
    def available(self) -> bool:
        """Whether `hf_xet` can be used."""
        return self._hf_xet is not None

    def read(self, file: XetFile, start: int, stop: int, headers: dict[str, str]) -> Iterator[bytes]:
        """Yield the bytes from `start` to `stop`, in order.

        Parameters
        ----------
        headers
            Headers for the token request to the Hub. Without Authorization they are also sent to the storage.

        Raises
        ------
        TransientOriginError
            Any failure: a read over plain HTTP may still work.
        """
        with _translate_errors():
            group, info = self._group(file.token_url, headers), self._hf_xet.XetFileInfo(file.name, file.size)
        for position in range(start, stop, _WINDOW):
            end = min(position + _WINDOW, stop)
            with _translate_errors():
                stream = group.download_stream(info, start=position, end=end)
            try:
                while position < end:
                    with _translate_errors():
                        chunk = next(stream, b"")
                    if not chunk:
                        raise TransientOriginError(f"Xet ended the stream at byte {position}, before byte {end}")
                    position += len(chunk)
                    yield chunk
            finally:
                stream.cancel()

    def close(self) -> None:
        """Abort the open streams and drop the tokens."""
        with self._lock:
            groups, self._groups, self._session = self._groups, {}, None
        for group in groups.values():
            group.abort()

    def _group(self, token_url: str, headers: dict[str, str]) -> Any:
        with self._lock:
            if self._session is None:
                self._session = self._hf_xet.XetSession(config=_config(self._hf_xet, self._settings))
            if token_url not in self._groups:
                headers = {"User-Agent": USER_AGENT, **headers}
                public = {name: value for name, value in headers.items() if name != "Authorization"}
                self._groups[token_url] = self._session.new_download_stream_group(
                    token_refresh_url=token_url, token_refresh_headers=headers, custom_headers=public
                )
            return self._groups[token_url]


def _module() -> Any:
    if constants.HF_HUB_DISABLE_XET:
        return None
    try:
        module = import_module("hf_xet")
    except ImportError:
        return None
    return module if hasattr(module, "XetSession") else None  # older versions have no streams, they write files


def _config(hf_xet: Any, settings: Settings) -> Any:
    limits = Timeouts.of(settings)
    return hf_xet.XetConfig().with_config(
        {
            "client.connect_timeout": timedelta(seconds=limits.connect),
            "client.read_timeout": timedelta(seconds=limits.read),
            "client.retry_max_attempts": 1,
            "client.retry_base_delay": timedelta(seconds=settings.retry_wait),
            "telemetry.enabled": False,  # compute nodes often have access to few hosts
        }
    )


@contextmanager
def _translate_errors() -> Iterator[None]:
    try:
        yield
    # The error classes of hf_xet derive from OSError and ValueError; failures of its runtime are RuntimeErrors.
    except (OSError, ValueError, RuntimeError) as error:
        raise TransientOriginError(redact(f"Xet: {type(error).__name__}: {error}")) from error
