"""The values that every rank of the check gets: what to check, and where it may write."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class CheckRequest:
    """The folders, sizes and origin to check.

    Attributes
    ----------
    run : str
        A unique id; part of the name of every file that the check writes.
    cache_dir : Path
        The cache folder to check.
    folders : dict of str to (list of str)
        The roles of each folder, by path: cache, shared, home, collect_in. The cache folder is one of them.
    size : int
        Bytes of the staged file, and of the file that measures the disk.
    origin : str or None
        A source to read from for some seconds.
    """

    run: str
    cache_dir: Path
    folders: dict[str, list[str]]
    size: int
    origin: str | None = None


@dataclass(frozen=True)
class ScratchPaths:
    """Every path that the check writes below one of the checked folders.

    Parameters
    ----------
    folder
        The checked folder.
    run
        As in `CheckRequest`.
    """

    folder: Path
    run: str

    @property
    def root(self) -> Path:
        """The folder that holds all other paths; the check removes it at its end."""
        return self.folder / f".weightferry-qualify-{self.run}"

    @property
    def markers(self) -> Path:
        """The folder with one marker file of each rank that can write here."""
        return self.root / "nonces"

    def lock(self, rank: int) -> Path:
        """The file that rank `rank` locks."""
        return self.root / f"lock-{rank}"

    def disk(self, rank: int) -> Path:
        """The file that rank `rank` writes and reads to measure the disk."""
        return self.root / f"disk-{rank}"

    @property
    def origin(self) -> Path:
        """The folder of the generated file."""
        return self.root / "origin"

    @property
    def cache(self) -> Path:
        """The cache folder for the stage of the generated file."""
        return self.root / "cache"
