"""Signed links to the content of files, asked for once and kept until they are refused or expire."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import datetime, timezone
from urllib.parse import parse_qs, urlsplit

from weightferry.origins.xet import XetFile

_MARGIN = 10.0  # seconds before its end in which a link is no longer used: clocks differ, and requests take their time


@dataclass(frozen=True)
class SignedUrl:
    """Where the content of one file is.

    Attributes
    ----------
    url
        A secret while it is valid: whoever holds it may read. Empty: there is no link, the Hub itself sends the bytes.
    xet
        The other way to them, where there is one.
    """

    url: str = field(default="", repr=False)
    xet: XetFile | None = None

    @property
    def expires(self) -> float:
        """When it ends, in seconds since the epoch, as far as its query tells: by CloudFront, S3 or GCS."""
        query = {name.lower(): values[-1] for name, values in parse_qs(urlsplit(self.url).query).items()}
        ends = [float(query["expires"])] if query.get("expires", "").isdigit() else []
        for prefix in ("x-amz-", "x-goog-"):
            try:
                signed = datetime.strptime(query[f"{prefix}date"], "%Y%m%dT%H%M%SZ").replace(tzinfo=timezone.utc)
                ends.append(signed.timestamp() + int(query[f"{prefix}expires"]))
            except (KeyError, ValueError):
                continue
        return min(ends, default=math.inf)


class SignedUrlCache:
    """The links of any number of files, for any number of threads: those who want the same one wait for one question.

    Parameters
    ----------
    clock
        Seconds since the epoch.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._kept: dict[Hashable, Future[SignedUrl]] = {}

    def get(self, key: Hashable, ask: Callable[[], SignedUrl], refused: SignedUrl | None = None) -> SignedUrl:
        """Return the link of `key`: a kept one unless it is `refused` or over, else what `ask` returns.

        What `ask` raises is raised in every thread that waits for it, and not kept.
        """
        with self._lock:
            kept = self._kept.get(key)
            mine = kept is None or (kept.done() and not self._usable(kept.result(), refused))
            if mine:
                kept = self._kept[key] = Future()
        assert kept is not None  # noqa: S101 for the type checker
        if mine:
            self._answer(key, kept, ask)
        return kept.result()

    def _usable(self, link: SignedUrl, refused: SignedUrl | None) -> bool:
        return link is not refused and link.expires - _MARGIN > self._clock()

    def _answer(self, key: Hashable, promised: Future[SignedUrl], ask: Callable[[], SignedUrl]) -> None:
        try:
            promised.set_result(ask())
        except BaseException as error:  # noqa: BLE001 it is raised where it is waited for, here too
            with self._lock:
                del self._kept[key]
            promised.set_exception(error)
