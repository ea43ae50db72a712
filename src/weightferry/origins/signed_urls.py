"""A cache of signed URLs: each is requested once, and kept until a server refuses it or it expires."""

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

_MARGIN = (
    10.0  # seconds before the expiry of a URL in which it is not used any more: clocks differ, and requests take time
)


@dataclass(frozen=True)
class SignedUrl:
    """The location of the content of one file.

    Attributes
    ----------
    url
        A secret while it is valid: anyone who has it can read the file. Empty if the Hub itself sends the bytes.
    xet
        Location of the same bytes in Xet; None if the file is not in Xet.
    """

    url: str = field(default="", repr=False)
    xet: XetFile | None = None

    @property
    def expires(self) -> float:
        """Time of expiry in seconds since the epoch, from the query of CloudFront, S3 or GCS; infinite if unknown."""
        query = {name.lower(): values[-1] for name, values in parse_qs(urlsplit(self.url).query).items()}
        expiries = [float(query["expires"])] if query.get("expires", "").isdigit() else []
        for prefix in ("x-amz-", "x-goog-"):
            try:
                signed_at = datetime.strptime(query[f"{prefix}date"], "%Y%m%dT%H%M%SZ").replace(tzinfo=timezone.utc)
                expiries.append(signed_at.timestamp() + int(query[f"{prefix}expires"]))
            except (KeyError, ValueError):
                continue
        return min(expiries, default=math.inf)


class SignedUrlCache:
    """Keeps the signed URLs of files. Threads that need the URL of the same file wait for one request.

    Safe to use from several threads.

    Parameters
    ----------
    clock
        Returns the time in seconds since the epoch.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._urls: dict[Hashable, Future[SignedUrl]] = {}

    def get(self, key: Hashable, fetch_url: Callable[[], SignedUrl], refused: SignedUrl | None = None) -> SignedUrl:
        """Return the URL of `key`: the cached one, unless it is `refused` or expired, else the result of `fetch_url`.

        An error of `fetch_url` is raised in every thread that waits for it, and is not cached.
        """
        with self._lock:
            pending = self._urls.get(key)
            is_requester = pending is None or (pending.done() and not self._usable(pending.result(), refused))
            if is_requester:
                pending = self._urls[key] = Future()
        assert pending is not None  # noqa: S101 for the type checker
        if is_requester:
            self._fetch(key, pending, fetch_url)
        return pending.result()

    def _usable(self, location: SignedUrl, refused: SignedUrl | None) -> bool:
        return location is not refused and location.expires - _MARGIN > self._clock()

    def _fetch(self, key: Hashable, pending: Future[SignedUrl], fetch_url: Callable[[], SignedUrl]) -> None:
        try:
            pending.set_result(fetch_url())
        except BaseException as error:  # noqa: BLE001 raised in every thread that waits, and in this one
            with self._lock:
                del self._urls[key]
            pending.set_exception(error)
