"""What a leader does for its domain: read its pieces, pass them round, publish each file when it is right."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field

from weightferry.cache.survey import Surveyor
from weightferry.cluster.control import Control
from weightferry.origins.base import Origin, origin_for
from weightferry.settings import Settings
from weightferry.transfer.arriving import Wrong
from weightferry.transfer.course import Course
from weightferry.transfer.passing import Passing
from weightferry.transfer.plan import Orders
from weightferry.transfer.reading import Reading
from weightferry.transfer.stock import Stock

# Files hashed at a time: SHA-256 runs at 1.8 GB/s a core (measured), so four keep up with 50 Gbit/s.
_HASHERS = 4


@dataclass(frozen=True)
class Brought:
    """What one leader did.

    Attributes
    ----------
    origin_bytes : int
        Bytes that came from the origin, those of broken attempts included.
    peer_bytes_in, peer_bytes_out : int
        Bytes that came from the left neighbour, and that went to the right one.
    copied_bytes : int
        Bytes that came from the user's Hugging Face cache.
    sha256 : mapping of int to str
        Of the files that were published, by their place in `Manifest.staged()`.
    wrong : mapping of int to Wrong
        Files that came with other bytes than promised; they are not published.
    """

    origin_bytes: int = 0
    peer_bytes_in: int = 0
    peer_bytes_out: int = 0
    sha256: Mapping[int, str] = field(default_factory=dict)
    wrong: Mapping[int, Wrong] = field(default_factory=dict)
    copied_bytes: int = 0

    def __add__(self, later: Brought) -> Brought:
        return Brought(
            self.origin_bytes + later.origin_bytes,
            self.peer_bytes_in + later.peer_bytes_in,
            self.peer_bytes_out + later.peer_bytes_out,
            {**self.sha256, **later.sha256},
            later.wrong,
            self.copied_bytes + later.copied_bytes,
        )


def bring(
    orders: Orders,
    surveyor: Surveyor,
    settings: Settings,
    control: Control,
    origins: Callable[[str, Settings], Origin] = origin_for,
) -> Brought:
    """Do this leader's part of the plan.

    Parameters
    ----------
    surveyor
        Of this domain's cache; its locks are held.

    Raises
    ------
    CollectError, OSError
        The first thing that went wrong. What was published before stays; what had come of other files is found by the
        next run. Nothing half-written has a final name.
    """
    plan, me = orders.plan, control.rank
    course = Course(control, orders.lacking)
    with ExitStack() as left:
        left.callback(course.stop.set)
        hashers = ThreadPoolExecutor(_HASHERS, thread_name_prefix="weightferry-hash")
        # Waited for: nobody publishes once the locks are given back.
        left.callback(hashers.shutdown, cancel_futures=True)
        stock = Stock(surveyor, orders.lacking, plan.pieces, hashers, course.ended)
        left.callback(stock.close)
        passing = Passing(plan.pieces, plan.passed_by(me), stock)
        control.expect(plan.bytes_for(me))
        stock.begin()
        passing.look()
        reading = Reading(stock, passing.look, settings, course, origins)
        left.callback(reading.close)
        reading.start(plan.reads[me], plan.pieces)
        if plan.edges_of(me):
            from weightferry.transfer.ring import join  # torch is only needed where there are neighbours

            left.enter_context(join(orders, stock, passing, settings, control, course))
        course.wait()
    moved = (course.origin_bytes, course.peer_bytes_in, course.peer_bytes_out)
    return Brought(*moved, course.sha256, course.wrong, course.copied_bytes)
