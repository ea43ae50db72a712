"""Every other URL that fsspec knows: s3://, gs://, az://, memory://, zip://...::..."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from fsspec.asyn import sync
from fsspec.core import url_to_fs

from weightferry.errors import AccessDenied, BadRequest, OriginError, SourceChanged, SourceNotFound, redact
from weightferry.manifest import File, PinnedSource, listing_commit
from weightferry.origins.base import CHUNK_SIZE, Silent, TransientOriginError, Unreachable, path_outside_source
from weightferry.settings import Settings
from weightferry.sources import Source

_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
# What says which version of an object this is, by the name each back end gives it.
_EXACT = ("ETag", "etag", "md5Hash", "content_md5", "versionId", "generation")
_VERSIONS = (*_EXACT, "LastModified", "mtime", "created")


class FsspecOrigin:
    """Objects behind fsspec, pinned by what the store says of their version.

    Each back end has its own configuration and time-outs, from its own environment variables; only `check_access` has ours.
    """

    def __init__(self, settings: Settings) -> None:
        self._patience = settings.connect_timeout + settings.read_timeout

    def resolve(self, source: Source, paths: Sequence[str]) -> PinnedSource:
        """See `Origin.resolve`."""
        with _translate_errors(source):
            fs, root = _open(source)
            fs.invalidate_cache()
            if list(paths) == [""] and fs.isfile(root):
                above, name = _folder_and_name(source.root)
                source, paths = Source(source.scheme, above, name), [name]
                fs, root = _open(source)
            found = {file.path: file for path in paths for file in _files(fs, root, path, source)}
            ranges = _sends_ranges(fs, root, found.values())
        files = tuple(replace(found[path], ranges=ranges) for path in sorted(found))
        return PinnedSource(source, listing_commit(files), files)

    @contextmanager
    def read(
        self, pinned: PinnedSource, path: str, start: int = 0, stop: int | None = None
    ) -> Iterator[Iterator[bytes]]:
        """See `Origin.read`."""
        source = pinned.source
        with _translate_errors(source):
            fs, root = _open(source)
        size, version = pinned.file(path).size, pinned.file(path).version
        end = min(stop, size) if stop is not None and size is not None else (size if stop is None else stop)
        # Not around the yield: what the reader does with the bytes may raise an OSError of its own (a full disk).
        yield _pieces(fs, _below(root, path), start, end, version, source)

    def check_access(self, source: Source) -> None:
        """See `Origin.check_access`."""
        with _translate_errors(source):
            fs, root = _open(source)
            fs.invalidate_cache()
            name = _below(root, source.path) if source.path else root
            if getattr(fs, "async_impl", False):
                # Back ends try again by themselves, for minutes; this call of fsspec's own ends that.
                sync(fs.loop, getattr(fs, "_info"), name, timeout=self._patience)  # noqa: B009 not ours, yet documented
            else:
                fs.info(name)

    def close(self) -> None:
        """See `Origin.close`; fsspec keeps connections for the whole process, whoever uses them."""


def _pieces(fs: Any, name: str, start: int, stop: int | None, version: str, source: Source) -> Iterator[bytes]:
    # cat_file asks the store for just these bytes; fs.open() would add a read-ahead cache of its own. Stores answer
    # in tens of milliseconds, so a request should bring megabytes.
    step = 16 * CHUNK_SIZE
    while stop is None or start < stop:
        with _translate_errors(source):
            piece: bytes = fs.cat_file(name, start=start, end=start + step if stop is None else min(start + step, stop))
        if not piece:
            break
        start += len(piece)
        yield piece
    with _translate_errors(source):
        _check_version(fs, name, version)


def _check_version(fs: Any, name: str, version: str) -> None:
    """Look again when all bytes are there: `cat_file` has no way to ask for those of one version."""
    key, _, value = version.partition(" ")
    if key not in _EXACT:  # times have one form in a listing and another for a single object, even in memory://
        return
    fs.invalidate_cache()
    now = fs.info(name).get(key)
    if now and str(now) != value:
        raise SourceChanged(f"changed at the origin during the transfer ({version} became {now})", subject=name)


def _sends_ranges(fs: Any, root: str, files: Iterable[File]) -> bool:
    """Try it, with one byte of one file: not every file system below fsspec can, and none says so."""
    large = next((file for file in files if (file.size or 0) > 1), None)
    if large is None:
        return True
    try:
        return len(fs.cat_file(_below(root, large.path), start=1, end=2)) == 1
    except (NotImplementedError, ValueError, TypeError):
        return False


def _open(source: Source) -> tuple[Any, str]:
    try:
        fs, root = url_to_fs(source.root)
    except ImportError as error:
        extra = _EXTRAS.get(source.scheme)
        what = f"pip install 'weightferry[{extra}]'" if extra else redact(str(error))
        raise BadRequest(f"{source.scheme}:// needs a package that is not installed: {what}") from error
    return fs, root


def _folder_and_name(url: str) -> tuple[str, str]:
    """Split the URL of one file; in a chain (zip://a/b::s3://c/d.zip) the first link that has a path names the file."""
    links = url.split("::")
    place = next(number for number, link in enumerate(links) if "://" in link)
    scheme, _, path = links[place].partition("://")
    folder, slash, name = path.rpartition("/")
    links[place] = f"{scheme}://{folder or slash}"
    return "::".join(links), name


def _below(root: str, path: str) -> str:
    return f"{root.rstrip('/')}/{path}" if root else path


def _files(fs: Any, root: str, path: str, source: Source) -> Iterator[File]:
    listed = fs.find(_below(root, path) if path else root, detail=True)
    if not listed:
        raise SourceNotFound("nothing there", subject=f"{source}/{path}" if path else str(source))
    for name, info in listed.items():
        below = name[len(root.rstrip("/")) :].lstrip("/")
        version = next((f"{key} {info[key]}" for key in _VERSIONS if info.get(key)), "")
        try:
            yield File(below, info.get("size"), version=version)
        except (ValueError, BadRequest) as error:
            raise path_outside_source(below, str(source)) from error


_KINDS: tuple[tuple[type[Exception] | tuple[type[Exception], ...], type[TransientOriginError]], ...] = (
    ((ConnectionRefusedError, socket.gaierror), Unreachable),
    # asyncio's is another class than the built-in one up to Python 3.10, and fsspec's own derives from it.
    ((TimeoutError, asyncio.TimeoutError), Silent),
)


@contextmanager
def _translate_errors(source: Source) -> Iterator[None]:
    """Turn what back ends raise into ours: fsspec asks them for the built-in `OSError` classes."""
    subject = str(source)
    try:
        yield
    except (BadRequest, OriginError, SourceNotFound, AccessDenied):
        raise
    except FileNotFoundError as error:
        raise SourceNotFound(redact(f"not there: {error}"), subject=subject) from error
    except PermissionError as error:
        raise AccessDenied(redact(f"no access: {error}"), subject=subject) from error
    except (IsADirectoryError, NotADirectoryError) as error:
        raise SourceNotFound(redact(str(error)), subject=subject) from error
    except (OSError, asyncio.TimeoutError) as error:
        kind = next((ours for theirs, ours in _KINDS if isinstance(error, theirs)), TransientOriginError)
        raise kind(redact(f"{type(error).__name__}: {error}"), subject=subject) from error
    except ValueError as error:
        # url_to_fs raises it for a scheme that nobody registered.
        raise BadRequest(redact(str(error)), subject=subject) from error
    except Exception as error:
        # A class of the back end's own library: botocore's, for an endpoint that nobody answers at.
        raise TransientOriginError(redact(f"{type(error).__name__}: {error}"), subject=subject) from error
