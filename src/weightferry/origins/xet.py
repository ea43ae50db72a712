"""Files of the Hub through Xet, its storage of chunks, where `hf_xet` is installed and nobody switched it off."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from importlib import import_module
from typing import Any

from huggingface_hub import constants

from weightferry.errors import redact
from weightferry.origins.base import TransientOriginError
from weightferry.origins.transport import timeouts
from weightferry.settings import Settings

_WINDOW = 64 << 20
"""Bytes asked for at a time: a stream reads ahead of its reader, up to all that it was asked for."""


@dataclass(frozen=True)
class XetFile:
    """What the Hub says of a file that is in Xet.

    Attributes
    ----------
    name
        Its hash there, in hexadecimal.
    size
        Bytes.
    token_url
        Where the Hub gives tokens for the storage.
    """

    name: str
    size: int
    token_url: str


class XetReader:
    """Reads files by range; one token and one pool of connections for each repository.

    `hf_xet` retries by itself. It is told to do so once, since there is another way to the same bytes.
    """

    def __init__(self, settings: Settings) -> None:
        self._hf_xet = _module()
        self._settings = settings
        self._lock = threading.Lock()
        self._session: Any = None
        self._groups: dict[str, Any] = {}

    @property
    def available(self) -> bool:
        """Whether it can be used."""
        return self._hf_xet is not None

    def read(self, file: XetFile, start: int, stop: int, headers: dict[str, str]) -> Iterator[bytes]:
        """Yield bytes `start` to `stop` in their order.

        Parameters
        ----------
        headers
            For the Hub, which is asked for a token; without its Authorization they go to the storage too.

        Raises
        ------
        TransientOriginError
            Whatever went wrong: another way to the bytes may still work.
        """
        with _translate_errors():
            group, info = self._group(file.token_url, headers), self._hf_xet.XetFileInfo(file.name, file.size)
        for place in range(start, stop, _WINDOW):
            end = min(place + _WINDOW, stop)
            with _translate_errors():
                stream = group.download_stream(info, start=place, end=end)
            try:
                while place < end:
                    with _translate_errors():
                        chunk = next(stream, b"")
                    if not chunk:
                        raise TransientOriginError(f"Xet ended at byte {place} of {end}")
                    place += len(chunk)
                    yield chunk
            finally:
                stream.cancel()

    def close(self) -> None:
        """End what is still under way and forget the tokens."""
        with self._lock:
            groups, self._groups, self._session = self._groups, {}, None
        for group in groups.values():
            group.abort()

    def _group(self, token_url: str, headers: dict[str, str]) -> Any:
        with self._lock:
            if self._session is None:
                self._session = self._hf_xet.XetSession(config=_config(self._hf_xet, self._settings))
            if token_url not in self._groups:
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
    return module if hasattr(module, "XetSession") else None  # older ones write files, and have no streams


def _config(hf_xet: Any, settings: Settings) -> Any:
    limits = timeouts(settings)
    return hf_xet.XetConfig().with_config(
        {
            "client.connect_timeout": timedelta(seconds=limits.connect),
            "client.read_timeout": timedelta(seconds=limits.read),
            "client.retry_max_attempts": 1,
            "client.retry_base_delay": timedelta(seconds=settings.retry_wait),
            "telemetry.enabled": False,  # compute nodes often reach nothing but what they were told to reach
        }
    )


@contextmanager
def _translate_errors() -> Iterator[None]:
    try:
        yield
    # All that hf_xet raises: its own classes derive from these two, but for failures of its runtime.
    except (OSError, ValueError, RuntimeError) as error:
        raise TransientOriginError(redact(f"Xet: {type(error).__name__}: {error}")) from error
