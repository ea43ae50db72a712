"""Local files and folders, used where they are."""

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
    """Reads local files and folders. A file is pinned by its size: every rank checks that it sees the same size."""

    def __init__(self, settings: Settings) -> None:
        del settings  # local files need no timeouts

    def resolve(self, source: Source, paths: Sequence[str]) -> PinnedSource:
        """See `Origin.resolve`."""
        root = Path(source.root)
        with _translate_errors(root):
            if root.is_file() and list(paths) == [""]:
                source = Source(source.scheme, str(root.parent), root.name)
                root, paths = root.parent, [root.name]
            if not root.is_dir():
                # Resolved from its parent, the root gets the error text that fits its type.
                paths, root = [f"{root.name}/{path}".rstrip("/") for path in paths], root.parent
            files = {file.path: file for path in paths for file in _list_files(root, path)}
        return PinnedSource(source, "", tuple(files[path] for path in sorted(files)))

    @contextlib.contextmanager
    def read(
        self, pinned: PinnedSource, path: str, start: int = 0, stop: int | None = None
    ) -> Iterator[Iterator[bytes]]:
        """See `Origin.read`."""
        with read_file(Path(pinned.source.root) / path, start, stop) as chunks:
            yield chunks

    def check_access(self, source: Source) -> None:
        """See `Origin.check_access`; does nothing, since every rank checks the files that it sees."""

    def close(self) -> None:
        """See `Origin.close`."""


@contextlib.contextmanager
def read_file(file_path: Path, start: int = 0, stop: int | None = None) -> Iterator[Iterator[bytes]]:
    """Open the bytes from `start` to `stop` of a file; raises the errors of `Origin.read`."""
    with contextlib.ExitStack() as stack:
        with _translate_errors(file_path):
            file = stack.enter_context(file_path.open("rb"))
        file.seek(start)
        yield _chunks(file.read, None if stop is None else stop - start)


def _chunks(read: Callable[[int], bytes], left: int | None) -> Iterator[bytes]:
    while left is None or left > 0:
        chunk = read(CHUNK_SIZE if left is None else min(CHUNK_SIZE, left))
        if not chunk:
            return
        left = None if left is None else left - len(chunk)
        yield chunk


def _list_files(root: Path, path: str) -> Iterator[File]:
    full = root / path
    if full.is_file():
        yield File(path, full.stat().st_size)
    elif full.is_dir():
        for folder, subfolders, names in os.walk(full, followlinks=True, onerror=_raise):
            subfolders[:] = [name for name in subfolders if not _is_link_to_ancestor(Path(folder) / name)]
            for name in names:
                file = Path(folder) / name
                inside = file.relative_to(root).as_posix()
                # A broken link is an error only for a rank that wants this file: it finds the file missing later.
                is_broken = file.is_symlink() and not file.exists()
                yield from [File(inside, None)] if is_broken else _list_files(root, inside)
    elif full.is_symlink():
        raise SourceNotFound(f"broken symbolic link to {os.readlink(full)}, which does not exist", subject=str(full))
    elif full.exists():
        raise BadRequest("neither a file nor a folder", subject=str(full))
    else:
        existing = [entry.name for entry in full.parent.iterdir()] if full.parent.is_dir() else []
        raise SourceNotFound(f"no such local file or folder{suggest_similar(full.name, existing)}", subject=str(full))


@contextlib.contextmanager
def _translate_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except CollectError:
        raise
    except FileNotFoundError as error:
        raise SourceNotFound(f"does not exist on this rank: {error}", subject=str(path)) from error
    except PermissionError as error:
        raise AccessDenied(f"this user may not read it: {error}", subject=str(path)) from error
    except OSError as error:
        raise OriginError(str(error), subject=str(path)) from error


def _is_link_to_ancestor(folder: Path) -> bool:
    """Return whether a folder is a link to one of its parents, where a walk would never end."""
    return folder.is_symlink() and folder.parent.resolve().is_relative_to(folder.resolve())


def _raise(error: OSError) -> None:
    raise error
