"""Folders that this rank sees: used where they are."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from weightferry.errors import AccessDenied, BadRequest, CollectError, OriginError, SourceNotFound
from weightferry.manifest import File, PinnedSource
from weightferry.origins.base import CHUNK_SIZE, suggest_similar
from weightferry.settings import Settings
from weightferry.sources import Source


class FilesystemOrigin:
    """Local files and folders. A file is pinned by its size: every rank checks that it sees the same."""

    def __init__(self, settings: Settings) -> None:
        del settings  # nothing here can be waited for

    def resolve(self, source: Source, paths: Sequence[str]) -> PinnedSource:
        """See `Origin.resolve`."""
        root = Path(source.root)
        with _translate_errors(root):
            if root.is_file() and list(paths) == [""]:
                source = Source(source.scheme, str(root.parent), root.name)
                root, paths = root.parent, [root.name]
            if not root.is_dir():
                # Named by its parent, the root itself gets the message that fits what it is.
                paths, root = [f"{root.name}/{path}".rstrip("/") for path in paths], root.parent
            files = {file.path: file for path in paths for file in _files(root, path)}
        return PinnedSource(source, "", tuple(files[path] for path in sorted(files)))

    @contextlib.contextmanager
    def read(
        self, pinned: PinnedSource, path: str, start: int = 0, stop: int | None = None
    ) -> Iterator[Iterator[bytes]]:
        """See `Origin.read`."""
        with read_file(Path(pinned.source.root) / path, start, stop) as chunks:
            yield chunks

    def check_access(self, source: Source) -> None:
        """See `Origin.check_access`; every rank looks at its own folders anyway."""

    def close(self) -> None:
        """See `Origin.close`."""


@contextlib.contextmanager
def read_file(at: Path, start: int = 0, stop: int | None = None) -> Iterator[Iterator[bytes]]:
    """Open bytes `start` to `stop` of a file; errors as of `Origin.read`."""
    with contextlib.ExitStack() as opened:
        with _translate_errors(at):
            file = opened.enter_context(at.open("rb"))
        file.seek(start)
        yield _chunks(file.read, None if stop is None else stop - start)


def _chunks(read: Callable[[int], bytes], left: int | None) -> Iterator[bytes]:
    while left is None or left > 0:
        chunk = read(CHUNK_SIZE if left is None else min(CHUNK_SIZE, left))
        if not chunk:
            return
        left = None if left is None else left - len(chunk)
        yield chunk


def _files(root: Path, path: str) -> Iterator[File]:
    at = root / path
    if at.is_file():
        yield File(path, at.stat().st_size)
    elif at.is_dir():
        for folder, below, names in os.walk(at, followlinks=True, onerror=_raise):
            below[:] = [name for name in below if not _leads_back(Path(folder) / name)]
            for name in names:
                file = Path(folder) / name
                inside = file.relative_to(root).as_posix()
                # A link that leads nowhere counts only for those who want that file: they will find it missing.
                yield from [File(inside, None)] if file.is_symlink() and not file.exists() else _files(root, inside)
    elif at.is_symlink():
        raise SourceNotFound(f"a link that leads nowhere, to {os.readlink(at)}", subject=str(at))
    elif at.exists():
        raise BadRequest("neither a file nor a folder", subject=str(at))
    else:
        there = [entry.name for entry in at.parent.iterdir()] if at.parent.is_dir() else []
        raise SourceNotFound(f"no such local file or folder{suggest_similar(at.name, there)}", subject=str(at))


@contextlib.contextmanager
def _translate_errors(at: Path) -> Iterator[None]:
    try:
        yield
    except CollectError:
        raise
    except FileNotFoundError as error:
        raise SourceNotFound(f"not there: {error}", subject=str(at)) from error
    except PermissionError as error:
        raise AccessDenied(f"not readable for this user: {error}", subject=str(at)) from error
    except OSError as error:
        raise OriginError(str(error), subject=str(at)) from error


def _leads_back(folder: Path) -> bool:
    """Whether a folder is a link to one of those above it: its files are listed there already, without an end here."""
    return folder.is_symlink() and folder.parent.resolve().is_relative_to(folder.resolve())


def _raise(error: OSError) -> None:
    raise error
