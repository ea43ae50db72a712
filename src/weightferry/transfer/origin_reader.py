"""Read the pieces of one leader from the origins, over several connections."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from weightferry.errors import CollectError, OriginUnreachable, error_context
from weightferry.manifest import Manifest
from weightferry.origins.base import Origin, TransientOriginError, Unreachable
from weightferry.origins.hub_cache import HubCacheOrigin, user_hub_cache
from weightferry.origins.registry import origin_for
from weightferry.settings import Settings
from weightferry.transfer.connection_limiter import ConnectionLimiter
from weightferry.transfer.piece_store import PieceStore
from weightferry.transfer.pieces import Piece
from weightferry.transfer.range_reader import RangeReader
from weightferry.transfer.transfer_session import TransferSession

logger = logging.getLogger(__name__)

T = TypeVar("T")


class OriginReader:
    """Reads pieces into the piece store.

    Parameters
    ----------
    piece_store
        Takes the bytes.
    on_bytes
        Called with the index of a file after more of its bytes were recorded.
    session
        Runs the threads, one for each connection.
    origins
        Returns the origin of a scheme; called once for each scheme.
    user_cache
        The Hugging Face cache of the user. None: ``HF_HUB_CACHE``.
    """

    def __init__(
        self,
        piece_store: PieceStore,
        on_bytes: Callable[[int], None],
        settings: Settings,
        session: TransferSession,
        origins: Callable[[str, Settings], Origin],
        user_cache: Path | None = None,
    ) -> None:
        self._piece_store, self._on_bytes, self._settings, self._session = piece_store, on_bytes, settings, session
        self._origins, self._readers, self._user_cache = origins, dict[str, RangeReader](), user_cache
        self._pieces = deque[Piece]()
        self._user_cache_reader: RangeReader | None = None

    def start(self, numbers: Sequence[int], pieces: Sequence[Piece]) -> None:
        """Start to read these pieces, in their order."""
        self._pieces.extend(pieces[number] for number in numbers)
        limiter = ConnectionLimiter(self._settings.connections)
        for piece in self._pieces:
            scheme = self._piece_store.files[piece.files[0]][0].source.scheme
            if scheme not in self._readers:
                origin = self._origins(scheme, self._settings)
                self._readers[scheme] = RangeReader(origin, self._settings, self._session, limiter)
        folders = HubCacheOrigin([self._user_cache or user_hub_cache()])
        self._user_cache_reader = RangeReader(folders, self._settings, _CopyMonitor(self._session), limiter)
        for _ in range(min(self._settings.connections, len(self._pieces))):
            self._session.start("read", self._run)

    def close(self) -> None:
        """Close all connections."""
        for reader in self._readers.values():
            reader.close()

    def _run(self) -> None:
        while True:
            self._session.check()
            try:
                piece = self._pieces.popleft()
            except IndexError:
                return
            self._read_piece(piece)

    def _read_piece(self, piece: Piece) -> None:
        for index in piece.files:
            pinned, file = self._piece_store.files[index]
            with error_context(subject=f"{pinned.name}/{file.path}"):
                if piece.bundle:
                    self._read_small(index)
                else:
                    self._read_big(index, piece)

    def _read_small(self, index: int) -> None:
        if self._piece_store.is_missing(index):
            pinned, file = self._piece_store.files[index]
            content, sha256 = self._read(index, lambda reader: reader.read_whole(pinned, file))
            self._piece_store.publish_small(index, content, sha256)
        self._on_bytes(index)

    def _read_big(self, index: int, piece: Piece) -> None:
        incoming = self._piece_store.incoming[index]

        def read(reader: RangeReader) -> None:
            spans = [(piece.start, None)] if piece.stop is None else incoming.missing(piece.start, piece.stop)
            for span in spans:
                reader.read_range(incoming, span, lambda: self._on_bytes(index))

        self._read(index, read)

    def _read(self, index: int, read: Callable[[RangeReader], T]) -> T:
        """Read from the user's Hugging Face cache if the file is there, otherwise from its origin."""
        pinned, file = self._piece_store.files[index]
        if self._user_cache_reader and index in self._piece_store.in_user_cache:
            try:
                return read(self._user_cache_reader)
            except (CollectError, OSError) as error:
                self._session.check()
                logger.warning(
                    "%s/%s: cannot read the copy in the user's Hugging Face cache (%s); reading from the origin",
                    pinned.name,
                    file.path,
                    error,
                )
        return read(self._readers[pinned.source.scheme])


class _CopyMonitor:
    """Counts bytes as copied from the user's Hugging Face cache; see `Monitor`."""

    def __init__(self, session: TransferSession) -> None:
        self.check, self.count_bytes = session.check, session.count_copied


def find_unreachable_sources(
    manifest: Manifest,
    missing: Sequence[int],
    settings: Settings,
    origins: Callable[[str, Settings], Origin] = origin_for,
) -> dict[int, CollectError]:
    """Test for each source with missing files whether this rank may read one of them at its origin.

    An origin that answers that it is too busy is reachable.

    Returns
    -------
    dict of int to CollectError
        By index of the source in the manifest, the reason. Reachable sources are not in it.
    """
    files = list(manifest.staged())
    errors: dict[int, CollectError] = {}
    for source, index in {manifest.source_of(index): index for index in missing}.items():
        pinned, file = files[index]
        name = f"{pinned.name}/{file.path}"
        try:
            # At the pinned commit, if the origin has commits.
            revision = pinned.commit if pinned.source.scheme == "hf" else pinned.source.revision
            with closing(origins(pinned.source.scheme, settings)) as origin:
                origin.check_access(replace(pinned.source, path=file.path, revision=revision))
        except TransientOriginError as error:
            if isinstance(error, Unreachable):
                errors[source] = OriginUnreachable(f"cannot reach the origin: {error}", subject=name)
        except CollectError as error:
            errors[source] = error
    return errors
