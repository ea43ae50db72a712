"""Atomic replacement of links and files: make the new one under a temporary name, then rename it."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable
from pathlib import Path

from weightferry.cache.permissions import make_folder, write_new
from weightferry.errors import BadRequest

_COPY_PIECE = 8 << 20  # bytes


def replace_symlink(link: Path, target: str | Path) -> None:
    """Make `link` a symbolic link to `target`. It replaces a file or a link there; missing parent folders are made.

    Does nothing when `link` already points to `target`. Several processes may call it for one `link` at the same time.

    Raises
    ------
    BadRequest
        `link` is a folder. Removing a folder could delete the user's files.
    """
    text = os.fspath(target)
    with contextlib.suppress(OSError):
        if link.is_symlink() and os.readlink(link) == text:
            return
    _refuse_folder(link)
    link.parent.mkdir(parents=True, exist_ok=True)
    new = temporary_name(link)
    new.symlink_to(text)
    try:
        new.replace(link)
    finally:
        with contextlib.suppress(FileNotFoundError):
            new.unlink()


def replace_with_copy(path: Path, source: Path, check: Callable[[], None] = lambda: None) -> None:
    """Make `path` a real file with the content of `source`. It replaces a file or a link there.

    Missing parent folders are made. For files outside of a cache: the permissions follow the umask. Several processes
    may call it for one `path` at the same time.

    Parameters
    ----------
    check
        Called between two pieces of the copy; an error that it raises ends the copy.

    Raises
    ------
    BadRequest
        `path` is a folder.
    """
    _refuse_folder(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = temporary_name(path)
    try:
        with source.open("rb") as read, new.open("xb") as written:
            while chunk := read.read(_COPY_PIECE):
                check()
                written.write(chunk)
        new.replace(path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            new.unlink()


def _refuse_folder(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        raise BadRequest(
            "cannot make this link: a folder is in the way. Move that folder away and try again", subject=str(path)
        )


def write_atomically(path: Path, content: str) -> None:
    """Write a small text file. Readers see the old content or the new content, never a part of it.

    Missing parent folders are made. Does nothing when the file already has this content. For files in a cache: the file
    gets the permissions of its folder.
    """
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if path.read_text() == content:
            return
    make_folder(path.parent)
    new = temporary_name(path)
    try:
        write_new(new, content.encode())
        new.replace(path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            new.unlink()


def create_atomically(path: Path, content: str) -> None:
    """Create a small text file. When several processes create it at once, one succeeds and all see its content.

    Raises
    ------
    FileExistsError
        The file exists already.
    """
    new = temporary_name(path)
    try:
        write_new(new, content.encode())
        os.link(new, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            new.unlink()


def temporary_name(path: Path) -> Path:
    """Return an unused, hidden file name in the folder of `path`."""
    # A file name has at most 255 bytes. One character may take four.
    return path.with_name(f".{path.name[:50]}.{secrets.token_hex(6)}")
