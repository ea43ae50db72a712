"""Read from an origin: a range of a big file to its place, or a small file whole."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable, Iterator

from weightferry.cache.partial import WrittenRange
from weightferry.errors import IntegrityError, SourceChanged
from weightferry.hashing import Hashes
from weightferry.manifest import File, Pinned
from weightferry.origins.base import Busy, Origin, RangeIgnored, TransientOriginError
from weightferry.origins.retry import Monitor, Retry
from weightferry.settings import Settings
from weightferry.transfer.connection_limiter import ConnectionLimiter
from weightferry.transfer.incoming_file import IncomingFile

logger = logging.getLogger(__name__)

# What is lost of a range when its reader is killed, at most; and how often readers of other leaders hear of new bytes.
_NOTED_EVERY = 1 << 20


class RangeReader:
    """Reads from one origin, as often as it takes. Safe to use from several threads.

    Parameters
    ----------
    settings
        Limit the attempts.
    watch
        Is told of bytes, and says when there is no point in going on.
    lanes
        Limit the reads that are open at a time, here and in other fetchers.
    """

    def __init__(self, origin: Origin, settings: Settings, monitor: Monitor, limiter: ConnectionLimiter) -> None:
        self._origin, self._settings, self._monitor, self._limiter = origin, settings, monitor, limiter

    def close(self) -> None:
        """Give its connections back."""
        self._origin.close()

    def range(self, incoming: IncomingFile, span: tuple[int, int | None], noted: Callable[[], None]) -> None:
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
            incoming.partial.write(start, came)
            incoming.note(WrittenRange(start, start + len(came), zlib.crc32(came)))
            start += len(came)
            came.clear()

        try:
            for chunk in self._read(incoming.pinned, incoming.file, span):
                came += chunk
                if len(came) >= _NOTED_EVERY:
                    keep()
                    noted()
        finally:
            if came:
                keep()
        if stop is None:
            incoming.end_at(start)
        noted()

    def whole(self, pinned: Pinned, file: File) -> tuple[bytes, str]:
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
            As for `range`.
        """
        for attempt in (1, 2):
            content = b"".join(self._read(pinned, file, (0, file.size)))
            hashes = Hashes(file.checksum, file.size)
            hashes.update(content)
            if hashes.right:
                return content, hashes.sha256
            logger.warning("%s/%s: wrong bytes came (attempt %d)", pinned.name, file.path, attempt)
        raise IntegrityError(
            f"the origin sends other bytes than it promises, twice: expected {file.checksum}, got {hashes.got}",
            subject=f"{pinned.name}/{file.path}",
        )

    def _read(self, pinned: Pinned, file: File, span: tuple[int, int | None]) -> Iterator[bytes]:
        """Yield the bytes of a range in order, going on where a broken connection left off."""
        retry, name = Retry(self._settings, self._monitor), f"{pinned.name}/{file.path}"
        (done, stop), ranged = span, file.ranges
        # The end is not named where it is the file's own: what is asked for whole needs no range at all.
        last = None if stop == file.size else stop
        while True:
            position = done if ranged else 0
            try:
                with (
                    self._limiter.one(self._monitor),
                    self._origin.read(pinned, file.path, position, last if ranged else None) as chunks,
                ):
                    for chunk in chunks:
                        self._monitor.check()
                        self._monitor.moved(len(chunk))
                        fresh = chunk[max(0, done - position) : None if stop is None else stop - position]
                        position += len(chunk)
                        _no_more_than_promised(position, file, name)
                        if fresh:
                            done += len(fresh)
                            retry.moved()
                            yield fresh
                        if done == last:
                            break
                if stop is None or done == stop:
                    self._limiter.served()
                    return
                raise TransientOriginError(f"the body ended after {done} of {file.size} bytes", subject=name)
            except TransientOriginError as error:
                if done == stop:
                    return  # cut after the last byte: there is no range left to ask for
                if isinstance(error, Busy):
                    self._limiter.refused()
                retry.wait(error)
            except RangeIgnored:
                logger.info("%s: ranges are ignored, reading from the beginning", name)
                ranged = False


def _no_more_than_promised(position: int, file: File, name: str) -> None:
    if file.size is not None and position > file.size:
        raise SourceChanged(f"the origin sends {position} bytes or more where it promised {file.size}", subject=name)
