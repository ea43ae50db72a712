"""Read one file from its origin into partial data, hash it on the way, and let nothing wrong through."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import BinaryIO

from weightferry.errors import IntegrityError, SourceChanged
from weightferry.hashing import Hashes
from weightferry.manifest import File, Pinned
from weightferry.origins.base import Origin, RangeIgnored, TransientOriginError
from weightferry.origins.retry import Retry, Watch
from weightferry.settings import Settings

logger = logging.getLogger(__name__)


def fetch(origin: Origin, pinned: Pinned, file: File, partial: Path, settings: Settings, watch: Watch) -> str:
    """Bring one file into `partial`.

    Bytes that are not the promised ones are asked for once more.

    Returns
    -------
    str
        The SHA-256 of the bytes.

    Raises
    ------
    IntegrityError
        Wrong bytes twice.
    OSError
        No space: found before the first byte, since the file is allocated whole.
    CollectError
        What the origin says, its transient errors after the retries of the settings.
    """
    partial.parent.mkdir(parents=True, exist_ok=True)
    for attempt in (1, 2):
        with partial.open("wb", buffering=0) as out:
            if file.size:
                _allocate(out, file.size, partial)
            hashes = _read(origin, pinned, file, out, settings, watch)
        if hashes.right:
            return hashes.sha256
        logger.warning("%s/%s: wrong bytes came (attempt %d)", pinned.name, file.path, attempt)
    raise IntegrityError(
        f"the origin sends other bytes than it promises, twice: expected {file.checksum}, got {hashes.got}",
        subject=f"{pinned.name}/{file.path}",
    )


def _allocate(out: BinaryIO, size: int, partial: Path) -> None:
    """Take the space before the first byte comes: a full disk is found now, not in half an hour."""
    try:
        os.posix_fallocate(out.fileno(), 0, size)
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror} ({size} bytes are needed)", str(partial.parent)) from error


def _read(origin: Origin, pinned: Pinned, file: File, out: BinaryIO, settings: Settings, watch: Watch) -> Hashes:
    """Read until the file is whole, going on where a broken connection left off."""
    retry = Retry(settings, watch)
    hashes, done, furthest = Hashes(file.checksum, file.size), 0, 0
    while True:
        try:
            with origin.read(pinned, file.path, done) as chunks:
                for chunk in chunks:
                    watch.check()
                    watch.moved(len(chunk))
                    _no_more_than_promised(done + len(chunk), pinned, file)
                    out.write(chunk)
                    hashes.update(chunk)
                    done += len(chunk)
                    if done > furthest:  # bytes that came before are no progress: a server may cut there for ever
                        furthest = done
                        retry.moved()
            _all_there(done, pinned, file)
        except TransientOriginError as error:
            if done == file.size:
                return hashes  # cut after the last byte: there is no range left to ask for
            retry.wait(error)
        except RangeIgnored as error:
            retry.wait(TransientOriginError("ranges are ignored: starting again", subject=str(error)))
            out.seek(0)
            if file.size is None:
                out.truncate()
            hashes, done = Hashes(file.checksum, file.size), 0
        else:
            return hashes


def _no_more_than_promised(done: int, pinned: Pinned, file: File) -> None:
    if file.size is not None and done > file.size:
        subject = f"{pinned.name}/{file.path}"
        raise SourceChanged(f"the origin sends {done} bytes or more where it promised {file.size}", subject=subject)


def _all_there(done: int, pinned: Pinned, file: File) -> None:
    if file.size is not None and done < file.size:
        subject = f"{pinned.name}/{file.path}"
        raise TransientOriginError(f"the body ended after {done} of {file.size} bytes", subject=subject)
