"""Faults that a test adds to a Hub server: errors, delays, closed connections, damaged bytes."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from weightferry.testing.hub.request_log import Kind

# These replace the whole response, so no other fault except a delay can show in it.
_REPLACING = ("status", "hang_up")
# A body can have only one of these.
_STOPPING = ("cut_after", "silent_after")
_EFFECTS = (*_REPLACING, *_STOPPING, "delay", "corrupt_at", "bytes_per_second", "ignore_range", "chunked")


@dataclass(frozen=True)
class Fault:
    """One way to fail, for the requests that match.

    A fault counts only the requests that show it: `cut_after` waits for a longer body, `corrupt_at` for a response with
    that byte, `ignore_range` for a request whose range has an effect. ``Fault(status=503, times=2)`` fails two requests
    and then stops.

    All effects of one fault happen together, and so do the effects of several faults, for example a rate limit and a
    cut. If one request cannot show two faults, for example two cuts, the later fault waits for the next request.

    Parameters
    ----------
    method
        Only requests with this method; None: all.
    path_suffix
        Only requests whose path (decoded, without the query) ends with this text. The path of every request for the
        content of a file ends with the path of the file.
    kind
        Only requests of this kind, see `RequestRecord`; None: all.
    times
        How many requests it fails; None: all, until it is cleared.
    status, headers
        Send a response with this status and these headers: ``Fault(status=503, headers={"Retry-After": "1"})``.
    delay
        Seconds to wait before the response; `math.inf`: send none.
    hang_up
        Close the connection instead of a response.
    cut_after
        Close the connection after this many bytes of the body.
    silent_after
        Send no more bytes after this many bytes of the body, and keep the connection open until the client or the
        server closes it.
    reset
        For `hang_up` and `cut_after`: close the connection with a reset (RST) instead of an orderly close. The bytes
        sent before arrive first.
    corrupt_at
        Invert the byte at this offset of the file.
    bytes_per_second
        Send the body at this rate.
    ignore_range
        Send the whole file with status 200 for a request with a range.
    chunked
        Send the body in chunks, without a Content-Length.
    """

    method: str | None = None
    path_suffix: str = ""
    kind: Kind | None = None
    times: int | None = 1
    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict, hash=False)
    delay: float | None = None
    hang_up: bool = False
    cut_after: int | None = None
    silent_after: int | None = None
    reset: bool = False
    corrupt_at: int | None = None
    bytes_per_second: float | None = None
    ignore_range: bool = False
    chunked: bool = False

    def __post_init__(self) -> None:
        if not any(_has(self, effect) for effect in _EFFECTS):
            raise ValueError("the fault has no effect: set status, hang_up, cut_after, silent_after, delay, ...")
        if self.times is not None and self.times < 1:
            raise ValueError(f"times must be 1 or more, or None for no limit, not {self.times}")
        if self.bytes_per_second is not None and self.bytes_per_second <= 0:
            raise ValueError("bytes_per_second must be above 0; use silent_after to send no bytes")


@dataclass(frozen=True)
class Exchange:
    """A request and its planned response; they decide whether a fault shows.

    Attributes
    ----------
    body_size
        Bytes of the planned body.
    file_range
        The range of file offsets in the body; empty if the body holds no part of a file.
    used_range
        Whether the request's Range header decided the response.
    """

    method: str
    path: str
    kind: Kind
    body_size: int
    file_range: range
    used_range: bool


class Faults:
    """The faults of a server, in the order of their addition. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._remaining: list[tuple[Fault, int | None]] = []

    def add(self, *faults: Fault) -> None:
        """Apply these faults to the next requests."""
        with self._lock:
            # Store copies, since `take` compares by identity: a test may add the same fault twice.
            self._remaining += [(replace(fault), fault.times) for fault in faults]

    def clear(self) -> None:
        """Remove all faults. Responses that already have a fault do not change."""
        with self._lock:
            self._remaining = []

    @property
    def left(self) -> list[Fault]:
        """The faults that will still happen; `times` is the number of remaining requests."""
        with self._lock:
            return [replace(fault, times=times) for fault, times in self._remaining]

    def take(self, exchange: Exchange) -> Fault | None:
        """Count the faults that show in this exchange, and return them merged into one."""
        with self._lock:
            shown = _compatible([fault for fault, _ in self._remaining if _matches(fault, exchange)])
            counted = [id(fault) for fault in shown]
            left = [(fault, n - 1 if n and id(fault) in counted else n) for fault, n in self._remaining]
            self._remaining = [(fault, n) for fault, n in left if n != 0]
        return _merge(shown)

    def __repr__(self) -> str:
        return f"Faults({self.left})"


def _has(fault: Fault, effect: str) -> bool:
    value = getattr(fault, effect)
    return value is not None and value is not False


def _matches(fault: Fault, exchange: Exchange) -> bool:
    return (
        fault.method in (None, exchange.method)
        and fault.kind in (None, exchange.kind)
        and exchange.path.endswith(fault.path_suffix)
        and _shows(fault, exchange)
    )


def _shows(fault: Fault, exchange: Exchange) -> bool:
    stops = [stop for stop in (fault.cut_after, fault.silent_after) if stop is not None]
    return (
        any(_has(fault, effect) for effect in (*_REPLACING, "delay"))
        or (fault.ignore_range and exchange.used_range)
        or ((fault.chunked or fault.bytes_per_second is not None) and exchange.body_size > 0)
        or (fault.corrupt_at is not None and fault.corrupt_at in exchange.file_range)
        or any(stop < exchange.body_size for stop in stops)
    )


def _compatible(faults: list[Fault]) -> list[Fault]:
    """Choose the faults that one response can show together, oldest first."""
    replacing = [fault for fault in faults if any(_has(fault, effect) for effect in _REPLACING)]
    if replacing:
        faults = [replacing[0], *(fault for fault in faults if _effect_groups(fault) == {"delay"})]
    chosen: list[Fault] = []
    used: set[str] = set()
    for fault in faults:
        if used.isdisjoint(_effect_groups(fault)):
            chosen.append(fault)
            used |= _effect_groups(fault)
    return chosen


def _effect_groups(fault: Fault) -> set[str]:
    return {"stop" if effect in _STOPPING else effect for effect in _EFFECTS if _has(fault, effect)}


def _merge(faults: list[Fault]) -> Fault | None:
    if not faults:
        return None
    values: dict[str, Any] = {}
    for fault in reversed(faults):
        values |= {name: getattr(fault, name) for name in (*_EFFECTS, "reset") if _has(fault, name)}
        values |= {"headers": fault.headers} if fault.status is not None else {}
    return replace(faults[0], **values)
