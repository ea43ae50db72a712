"""Read from an origin: a range of a big file to its place, or a small file whole."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable, Iterator

from weightferry.cache.partial import Run
from weightferry.errors import IntegrityError, SourceChanged
from weightferry.hashing import Hashes
from weightferry.manifest import File, Pinned
from weightferry.origins.base import Origin, RangeIgnored, TransientOriginError
from weightferry.origins.retry import Retry, Watch
from weightferry.settings import Settings
from weightferry.transfer.arriving import Arriving

logger = logging.getLogger(__name__)

# What is lost of a range when its reader is killed, at most; and how often readers of other leaders hear of new bytes.
_NOTED_EVERY = 1 << 20


def fetch_range(
    origin: Origin,
    arriving: Arriving,
    span: tuple[int, int | None],
    settings: Settings,
    watch: Watch,
    noted: Callable[[], None],
) -> None:
    """Read bytes from `span[0]` to `span[1]` (None: to the end, wherever it is) of a file to their place.

    Parameters
    ----------
    noted
        Called after each part of it is there.

    Raises
    ------
    CollectError
        What the origin says, its transient errors after the retries of the settings.
    """
    start, stop = span
    # Collected first: each call that lets other threads run is one more time to wait for them.
    came = bytearray()

    def keep() -> None:
        nonlocal start
        arriving.partial.write(start, came)
        arriving.note(Run(start, start + len(came), zlib.crc32(came)))
        start += len(came)
        came.clear()

    try:
        for chunk in read(origin, arriving.pinned, arriving.file, span, settings, watch):
            came += chunk
            if len(came) >= _NOTED_EVERY:
                keep()
                noted()
    finally:
        if came:
            keep()
    if stop is None:
        arriving.end_at(start)
    noted()


def fetch_whole(origin: Origin, pinned: Pinned, file: File, settings: Settings, watch: Watch) -> tuple[bytes, str]:
    """Read a small file; bytes that are not the promised ones are asked for once more.

    Returns
    -------
    bytes, str
        The bytes and their SHA-256.

    Raises
    ------
    IntegrityError
        Wrong bytes twice.
    CollectError
        As for `fetch_range`.
    """
    for attempt in (1, 2):
        content = b"".join(read(origin, pinned, file, (0, file.size), settings, watch))
        hashes = Hashes(file.checksum, file.size)
        hashes.update(content)
        if hashes.right:
            return content, hashes.sha256
        logger.warning("%s/%s: wrong bytes came (attempt %d)", pinned.name, file.path, attempt)
    raise IntegrityError(
        f"the origin sends other bytes than it promises, twice: expected {file.checksum}, got {hashes.got}",
        subject=f"{pinned.name}/{file.path}",
    )


def read(
    origin: Origin, pinned: Pinned, file: File, span: tuple[int, int | None], settings: Settings, watch: Watch
) -> Iterator[bytes]:
    """Yield the bytes of a range in order, going on where a broken connection left off."""
    retry, name = Retry(settings, watch), f"{pinned.name}/{file.path}"
    (done, stop), ranged = span, file.ranges
    # The end is not named where it is the file's own: what is asked for whole needs no range at all.
    last = None if stop == file.size else stop
    while True:
        position = done if ranged else 0
        try:
            with origin.read(pinned, file.path, position, last if ranged else None) as chunks:
                for chunk in chunks:
                    watch.check()
                    watch.moved(len(chunk))
                    fresh = chunk[max(0, done - position) : None if stop is None else stop - position]
                    position += len(chunk)
                    _no_more_than_promised(position, file, name)
                    if fresh:
                        done += len(fresh)
                        retry.moved()
                        yield fresh
                    if done == last:
                        return
            if stop is None or done == stop:
                return
            raise TransientOriginError(f"the body ended after {done} of {file.size} bytes", subject=name)
        except TransientOriginError as error:
            if done == stop:
                return  # cut after the last byte: there is no range left to ask for
            retry.wait(error)
        except RangeIgnored:
            logger.info("%s: ranges are ignored, reading from the beginning", name)
            ranged = False


def _no_more_than_promised(position: int, file: File, name: str) -> None:
    if file.size is not None and position > file.size:
        raise SourceChanged(f"the origin sends {position} bytes or more where it promised {file.size}", subject=name)
