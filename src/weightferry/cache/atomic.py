"""Links that are never missing for a moment: made under another name, then renamed."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path

from weightferry.cache.permissions import make_folder, write_new
from weightferry.errors import BadRequest


def point(link: Path, target: str | Path) -> None:
    """Make `link` a symbolic link to `target`, in place of any file or link there; parents are made.

    Nothing happens when it already is that link. Safe against others who do the same at the same time.

    Raises
    ------
    BadRequest
        A folder is in the way: it is not ours to remove.
    """
    text = os.fspath(target)
    with contextlib.suppress(OSError):
        if link.is_symlink() and os.readlink(link) == text:
            return
    if link.is_dir() and not link.is_symlink():
        raise BadRequest("a folder is in the way of the link", subject=str(link))
    link.parent.mkdir(parents=True, exist_ok=True)
    new = beside(link)
    new.symlink_to(text)
    try:
        new.replace(link)
    finally:
        with contextlib.suppress(FileNotFoundError):
            new.unlink()


def write_atomically(path: Path, content: str) -> None:
    """Write a small text file so that readers see the old or the new one, never a part; parents are made.

    In a cache: it has the rights of its folder.
    """
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if path.read_text() == content:
            return
    make_folder(path.parent)
    new = beside(path)
    try:
        write_new(new, content.encode())
        new.replace(path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            new.unlink()


def create_atomically(path: Path, content: str) -> None:
    """Write a small text file unless it is there; of several who do so at once, one wins and all see its content.

    Raises
    ------
    FileExistsError
        It is there.
    """
    new = beside(path)
    try:
        write_new(new, content.encode())
        os.link(new, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            new.unlink()


def beside(path: Path) -> Path:
    """Return a name in the same folder that nobody else uses."""
    # At most 255 bytes, of which a character may take four.
    return path.with_name(f".{path.name[:50]}.{secrets.token_hex(6)}")
