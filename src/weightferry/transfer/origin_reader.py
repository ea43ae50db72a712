"""What a leader reads from the origins: piece after piece, over several connections."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from typing import TypeVar

from weightferry.errors import CollectError, OriginUnreachable, at
from weightferry.manifest import Manifest
from weightferry.origins.base import Origin, TransientOriginError, Unreachable, origin_for
from weightferry.origins.hub_cache import HubCacheOrigin, user_hub_cache
from weightferry.settings import Settings
from weightferry.transfer.connection_limiter import ConnectionLimiter
from weightferry.transfer.piece_store import PieceStore
from weightferry.transfer.pieces import Piece
from weightferry.transfer.range_reader import RangeReader
from weightferry.transfer.session import TransferSession

logger = logging.getLogger(__name__)

T = TypeVar("T")


class OriginReader:
    """Reads pieces into the stock.

    Parameters
    ----------
    stock
        Where the bytes go.
    noted
        Called with the place of a file after more of it is there.
    course
        Runs the threads, one for each connection.
    origins
        Makes the origin of a scheme; each is made once.
    """

    def __init__(
        self,
        piece_store: PieceStore,
        noted: Callable[[int], None],
        settings: Settings,
        session: TransferSession,
        origins: Callable[[str, Settings], Origin],
    ) -> None:
        self._piece_store, self._noted, self._settings, self._session = piece_store, noted, settings, session
        self._origins, self._readers = origins, dict[str, RangeReader]()
        self._pieces = deque[Piece]()
        self._nearby: RangeReader | None = None

    def start(self, numbers: Sequence[int], pieces: Sequence[Piece]) -> None:
        """Begin to read these pieces, in their order."""
        self._pieces.extend(pieces[number] for number in numbers)
        limiter = ConnectionLimiter(self._settings.connections)
        for piece in self._pieces:
            scheme = self._piece_store.files[piece.files[0]][0].source.scheme
            if scheme not in self._readers:
                origin = self._origins(scheme, self._settings)
                self._readers[scheme] = RangeReader(origin, self._settings, self._session, limiter)
        folders = HubCacheOrigin([user_hub_cache()])
        self._nearby = RangeReader(folders, self._settings, _CopyMonitor(self._session), limiter)
        for _ in range(min(self._settings.connections, len(self._pieces))):
            self._session.start("read", self._run)

    def close(self) -> None:
        """Give all connections back."""
        for reader in self._readers.values():
            reader.close()

    def _run(self) -> None:
        while True:
            self._session.check()
            try:
                piece = self._pieces.popleft()
            except IndexError:
                return
            self._piece(piece)

    def _piece(self, piece: Piece) -> None:
        for index in piece.files:
            pinned, file = self._piece_store.files[index]
            with at(subject=f"{pinned.name}/{file.path}"):
                if piece.bundle:
                    self._small(index)
                else:
                    self._range(index, piece)

    def _small(self, index: int) -> None:
        if self._piece_store.is_missing(index):
            pinned, file = self._piece_store.files[index]
            content, sha256 = self._read(index, lambda reader: reader.whole(pinned, file))
            self._piece_store.keep(index, content, sha256)
        self._noted(index)

    def _range(self, index: int, piece: Piece) -> None:
        incoming = self._piece_store.incoming[index]

        def read(reader: RangeReader) -> None:
            spans = [(piece.start, None)] if piece.stop is None else incoming.missing(piece.start, piece.stop)
            for span in spans:
                reader.range(incoming, span, lambda: self._noted(index))

        self._read(index, read)

    def _read(self, index: int, read: Callable[[RangeReader], T]) -> T:
        """Read near by if it is there, else from its origin."""
        pinned, file = self._piece_store.files[index]
        if self._nearby and index in self._piece_store.nearby:
            try:
                return read(self._nearby)
            except (CollectError, OSError) as error:
                self._session.check()
                logger.warning("%s/%s: %s; reading from the origin", pinned.name, file.path, error)
        return read(self._readers[pinned.source.scheme])


class _CopyMonitor:
    """Counts bytes as copied; see `Monitor`."""

    def __init__(self, session: TransferSession) -> None:
        self.check, self.moved = session.check, session.copied


def unreachable(
    manifest: Manifest,
    missing: Sequence[int],
    settings: Settings,
    origins: Callable[[str, Settings], Origin] = origin_for,
) -> dict[int, CollectError]:
    """Ask of each source that has something missing whether this rank may read one of its files.

    An origin that answers that it is busy was reached.

    Returns
    -------
    dict of int to CollectError
        By the place of a source in the manifest, why not.
    """
    files = list(manifest.staged())
    cannot: dict[int, CollectError] = {}
    for source, index in {manifest.source_of(index): index for index in missing}.items():
        pinned, file = files[index]
        name = f"{pinned.name}/{file.path}"
        try:
            # At the pinned commit, where there are commits.
            revision = pinned.commit if pinned.source.scheme == "hf" else pinned.source.revision
            with closing(origins(pinned.source.scheme, settings)) as origin:
                origin.reach(replace(pinned.source, path=file.path, revision=revision))
        except TransientOriginError as error:
            if isinstance(error, Unreachable):
                cannot[source] = OriginUnreachable(f"cannot be reached: {error}", subject=name)
        except CollectError as error:
            cannot[source] = error
    return cannot
