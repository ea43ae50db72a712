"""Faults: what can go wrong between a client and the Hub, as values to add to a server."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from weightferry.testing.hub.records import Kind

# These leave nothing of the answer that another fault could show in.
_INSTEAD = ("status", "hang_up")
# Of these, one happens to a body.
_ENDS = ("cut_after", "silent_after")
_EFFECTS = (*_INSTEAD, *_ENDS, "delay", "corrupt_at", "bytes_per_second", "ignore_range", "chunked")


@dataclass(frozen=True)
class Fault:
    """One way to fail, for the requests that match.

    A fault is spent only by a request in which it shows: `cut_after` waits for a body that is longer, `corrupt_at` for
    an answer that holds that byte, `ignore_range` for a request whose range would have counted. ``Fault(status=503,
    times=2)`` fails two requests and then no more.

    Several effects of one fault happen together, and so do those of several faults, say one for a rate and one that
    cuts. Where one request cannot show two faults, as with two that cut, the younger one waits for the next request.

    Parameters
    ----------
    method
        Only requests by this method; None matches all.
    path_suffix
        Only requests whose path (decoded, without the query) ends so. The paths of all requests about the content of
        a file end in the path of the file.
    kind
        Only requests of this kind, see `RequestRecord`; None matches all.
    times
        How many requests it hits; None: all, until it is cleared.
    status, headers
        Answer with this status and these headers: ``Fault(status=503, headers={"Retry-After": "1"})``.
    delay
        Seconds to wait before the answer; `math.inf`: it never comes.
    hang_up
        End the connection instead of an answer.
    cut_after
        End the connection after this many bytes of the body.
    silent_after
        Send nothing more after this many bytes of the body, and keep the connection open until the client or the
        server closes it.
    reset
        End connections by a reset (RST) and not by an orderly close, for `hang_up` and `cut_after`. What was sent
        before arrives first.
    corrupt_at
        Invert the byte at this offset of the file.
    bytes_per_second
        Send the body at this rate.
    ignore_range
        Answer 200 with the whole file where a range was asked for.
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
            raise ValueError("a fault without an effect")
        if self.times is not None and self.times < 1:
            raise ValueError(f"times must be 1 or more, or None for ever, not {self.times}")
        if self.bytes_per_second is not None and self.bytes_per_second <= 0:
            raise ValueError("bytes_per_second must be above 0; silent_after sends nothing")


@dataclass(frozen=True)
class Exchange:
    """A request and the answer it would get: what decides whether a fault shows.

    Attributes
    ----------
    body
        Bytes of the body that would be sent.
    span
        The bytes of the file in it; empty where it holds none.
    ranged
        Whether a Range header decided what the answer holds.
    """

    method: str
    path: str
    kind: Kind
    body: int
    span: range
    ranged: bool


class Faults:
    """The faults of a server, in the order in which they were added. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._left: list[tuple[Fault, int | None]] = []

    def add(self, *faults: Fault) -> None:
        """Let these happen from now on."""
        with self._lock:
            # Copies, since they are told apart by identity: the same one may be added twice.
            self._left += [(replace(fault), fault.times) for fault in faults]

    def clear(self) -> None:
        """Drop all, spent or not. Requests already hit stay as they are."""
        with self._lock:
            self._left = []

    @property
    def left(self) -> list[Fault]:
        """The faults that have not happened as often as they should; `times` says how often they still will."""
        with self._lock:
            return [replace(fault, times=times) for fault, times in self._left]

    def take(self, exchange: Exchange) -> Fault | None:
        """Spend the faults that show in this exchange, and return them as one."""
        with self._lock:
            hits = _compatible([fault for fault, _ in self._left if _matches(fault, exchange)])
            spent = [id(fault) for fault in hits]
            left = [(fault, n - 1 if n and id(fault) in spent else n) for fault, n in self._left]
            self._left = [(fault, n) for fault, n in left if n != 0]
        return _merged(hits)

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
        any(_has(fault, effect) for effect in (*_INSTEAD, "delay"))
        or (fault.ignore_range and exchange.ranged)
        or ((fault.chunked or fault.bytes_per_second is not None) and exchange.body > 0)
        or (fault.corrupt_at is not None and fault.corrupt_at in exchange.span)
        or any(stop < exchange.body for stop in stops)
    )


def _compatible(faults: list[Fault]) -> list[Fault]:
    """Choose, oldest first, what can happen to one request."""
    instead = [fault for fault in faults if any(_has(fault, effect) for effect in _INSTEAD)]
    if instead:
        faults = [instead[0], *(fault for fault in faults if _kinds_of_effect(fault) == {"delay"})]
    chosen: list[Fault] = []
    taken: set[str] = set()
    for fault in faults:
        if taken.isdisjoint(_kinds_of_effect(fault)):
            chosen.append(fault)
            taken |= _kinds_of_effect(fault)
    return chosen


def _kinds_of_effect(fault: Fault) -> set[str]:
    return {"end" if effect in _ENDS else effect for effect in _EFFECTS if _has(fault, effect)}


def _merged(faults: list[Fault]) -> Fault | None:
    if not faults:
        return None
    values: dict[str, Any] = {}
    for fault in reversed(faults):
        values |= {name: getattr(fault, name) for name in (*_EFFECTS, "reset") if _has(fault, name)}
        values |= {"headers": fault.headers} if fault.status is not None else {}
    return replace(faults[0], **values)
