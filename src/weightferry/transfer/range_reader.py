"""Read from an origin: a range of a big file into its partial file, or a small file whole."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable, Iterator

from weightferry.cache.partial import WrittenRange
from weightferry.errors import IntegrityError, SourceChanged
from weightferry.hashing import Hashes
from weightferry.manifest import File, PinnedSource
from weightferry.origins.base import Busy, Origin, RangeIgnored, TransientOriginError
from weightferry.origins.retry import Monitor, Retry
from weightferry.settings import Settings
from weightferry.transfer.connection_limiter import ConnectionLimiter
from weightferry.transfer.incoming_file import IncomingFile

logger = logging.getLogger(__name__)

# At most this is lost of a range when its reader is killed. The relay hears of new bytes as often.
_RECORD_EVERY = 1 << 20


class RangeReader:
    """Reads from one origin, with retries. Safe to use from several threads.

    Parameters
    ----------
    settings
        Limit the retries.
    watch
        Counts bytes, and raises when the operation has ended.
    limiter
        Limits the open reads, shared with other readers.
    """

    def __init__(self, origin: Origin, settings: Settings, monitor: Monitor, limiter: ConnectionLimiter) -> None:
        self._origin, self._settings, self._monitor, self._limiter = origin, settings, monitor, limiter

    def close(self) -> None:
        """Close its connections."""
        self._origin.close()

    def read_range(self, incoming: IncomingFile, span: tuple[int, int | None], recorded: Callable[[], None]) -> None:
        """Read bytes from `span[0]` to `span[1]` of a file into its partial file; None means the end of the file.

        Parameters
        ----------
        recorded
            Called each time more bytes were recorded.

        Raises
        ------
        CollectError
            The error of the origin; for transient errors after the retries of the settings.
        """
        start, stop = span
        # Bytes are gathered first: each system call lets other threads run, and then waits for them.
        buffer = bytearray()

        def flush() -> None:
            nonlocal start
            incoming.partial.write(start, buffer)
            incoming.record(WrittenRange(start, start + len(buffer), zlib.crc32(buffer)))
            start += len(buffer)
            buffer.clear()

        try:
            for chunk in self._read(incoming.pinned, incoming.file, span):
                buffer += chunk
                if len(buffer) >= _RECORD_EVERY:
                    flush()
                    recorded()
        finally:
            if buffer:
                flush()
        if stop is None:
            incoming.set_size(start)
        recorded()

    def read_whole(self, pinned: PinnedSource, file: File) -> tuple[bytes, str]:
        """Read a small file; after a checksum mismatch it is downloaded once more.

        Returns
        -------
        bytes, str
            The bytes and their SHA-256.

        Raises
        ------
        IntegrityError
            Checksum mismatch after the second download.
        CollectError
            As for `read_range`.
        """
        for attempt in (1, 2):
            content = b"".join(self._read(pinned, file, (0, file.size)))
            hashes = Hashes(file.checksum, file.size)
            hashes.update(content)
            if hashes.matches:
                return content, hashes.sha256
            logger.warning("%s/%s: checksum mismatch (download %d of 2)", pinned.name, file.path, attempt)
        raise IntegrityError(
            f"checksum mismatch after a second download: expected {file.checksum}, got {hashes.hexdigest}. The file at "
            "the origin is damaged or was replaced; check it there, or pin another revision.",
            subject=f"{pinned.name}/{file.path}",
        )

    def _read(self, pinned: PinnedSource, file: File, span: tuple[int, int | None]) -> Iterator[bytes]:
        """Yield the bytes of a range in order; after a broken connection it continues where that ended."""
        retry, name = Retry(self._settings, self._monitor), f"{pinned.name}/{file.path}"
        (done, stop), ranged = span, file.ranges
        # The end of the file is not named: a request for the whole file needs no range.
        last = None if stop == file.size else stop
        while True:
            position = done if ranged else 0
            try:
                with (
                    self._limiter.slot(self._monitor),
                    self._origin.read(pinned, file.path, position, last if ranged else None) as chunks,
                ):
                    for chunk in chunks:
                        self._monitor.check()
                        self._monitor.count_bytes(len(chunk))
                        fresh = chunk[max(0, done - position) : None if stop is None else stop - position]
                        position += len(chunk)
                        _check_length(position, file, name)
                        if fresh:
                            done += len(fresh)
                            retry.reset()
                            yield fresh
                        if done == last:
                            break
                if stop is None or done == stop:
                    self._limiter.on_served()
                    return
                raise TransientOriginError(f"the body ended after {done} of {file.size} bytes", subject=name)
            except TransientOriginError as error:
                if done == stop:
                    return  # the connection broke after the last byte, so nothing is missing
                if isinstance(error, Busy):
                    self._limiter.on_refused()
                retry.wait(error)
            except RangeIgnored:
                logger.info("%s: the origin ignores ranges; reading from the start of the file", name)
                ranged = False


def _check_length(position: int, file: File, name: str) -> None:
    if file.size is not None and position > file.size:
        raise SourceChanged(f"the origin sends at least {position} bytes, but announced {file.size}", subject=name)
