"""All other URLs that fsspec supports: s3://, gs://, az://, memory://, zip://...::..."""

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
# Keys of the validators of an object's version; each back end uses its own key.
_EXACT_VALIDATORS = ("ETag", "etag", "md5Hash", "content_md5", "versionId", "generation")
_VALIDATORS = (*_EXACT_VALIDATORS, "LastModified", "mtime", "created")


class FsspecOrigin:
    """Reads objects through fsspec, pinned by the version that the store gives them.

    Each back end has its own configuration and timeouts, from its own environment variables. Only `check_access` uses
    the timeouts of `Settings`.
    """

    def __init__(self, settings: Settings) -> None:
        self._check_timeout = settings.connect_timeout + settings.read_timeout

    def resolve(self, source: Source, paths: Sequence[str]) -> PinnedSource:
        """See `Origin.resolve`."""
        with _translate_errors(source):
            fs, root = _open(source)
            fs.invalidate_cache()
            if list(paths) == [""] and fs.isfile(root):
                folder, name = _folder_and_name(source.root)
                source, paths = Source(source.scheme, folder, name), [name]
                fs, root = _open(source)
            by_path = {file.path: file for path in paths for file in _list_files(fs, root, path, source)}
            ranges = _supports_ranges(fs, root, by_path.values())
        files = tuple(replace(by_path[path], ranges=ranges) for path in sorted(by_path))
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
        # Errors are not translated around the yield: the reader of the bytes may raise its own OSError (a full disk).
        yield _read_chunks(fs, _join(root, path), start, end, version, source)

    def check_access(self, source: Source) -> None:
        """See `Origin.check_access`."""
        with _translate_errors(source):
            fs, root = _open(source)
            fs.invalidate_cache()
            name = _join(root, source.path) if source.path else root
            if getattr(fs, "async_impl", False):
                # Back ends retry by themselves, for minutes; fsspec's `sync` limits that.
                sync(fs.loop, getattr(fs, "_info"), name, timeout=self._check_timeout)  # noqa: B009 documented by fsspec
            else:
                fs.info(name)

    def close(self) -> None:
        """See `Origin.close`; does nothing, since fsspec shares its connections in the whole process."""


def _read_chunks(fs: Any, name: str, start: int, stop: int | None, version: str, source: Source) -> Iterator[bytes]:
    # cat_file requests exactly these bytes; fs.open() would add its own read-ahead cache. A store answers in tens of
    # milliseconds, so one request should transfer megabytes.
    step = 16 * CHUNK_SIZE
    while stop is None or start < stop:
        with _translate_errors(source):
            chunk: bytes = fs.cat_file(name, start=start, end=start + step if stop is None else min(start + step, stop))
        if not chunk:
            break
        start += len(chunk)
        yield chunk
    with _translate_errors(source):
        _check_version(fs, name, version)


def _check_version(fs: Any, name: str, version: str) -> None:
    """Compare the version after all bytes were read: `cat_file` cannot request the bytes of one version."""
    key, _, value = version.partition(" ")
    if key not in _EXACT_VALIDATORS:  # listings and single objects format times differently, even in memory://
        return
    fs.invalidate_cache()
    now = fs.info(name).get(key)
    if now and str(now) != value:
        raise SourceChanged(
            f"changed at the origin during the transfer: {version} became {now}. Start the transfer again", subject=name
        )


def _supports_ranges(fs: Any, root: str, files: Iterable[File]) -> bool:
    """Try to read one byte of one file: some file systems of fsspec cannot read ranges, and none declares it."""
    large = next((file for file in files if (file.size or 0) > 1), None)
    if large is None:
        return True
    try:
        return len(fs.cat_file(_join(root, large.path), start=1, end=2)) == 1
    except (NotImplementedError, ValueError, TypeError):
        return False


def _open(source: Source) -> tuple[Any, str]:
    try:
        fs, root = url_to_fs(source.root)
    except ImportError as error:
        extra = _EXTRAS.get(source.scheme)
        command = f"pip install 'weightferry[{extra}]'" if extra else redact(str(error))
        raise BadRequest(f"{source.scheme}:// needs a package that is not installed: {command}") from error
    return fs, root


def _folder_and_name(url: str) -> tuple[str, str]:
    """Split the URL of one file; in a chain (zip://a/b::s3://c/d.zip) the first URL with a path names the file."""
    urls = url.split("::")
    first = next(number for number, one in enumerate(urls) if "://" in one)
    scheme, _, path = urls[first].partition("://")
    folder, slash, name = path.rpartition("/")
    urls[first] = f"{scheme}://{folder or slash}"
    return "::".join(urls), name


def _join(root: str, path: str) -> str:
    return f"{root.rstrip('/')}/{path}" if root else path


def _list_files(fs: Any, root: str, path: str, source: Source) -> Iterator[File]:
    listed = fs.find(_join(root, path) if path else root, detail=True)
    if not listed:
        raise SourceNotFound("no such file or folder in the store", subject=f"{source}/{path}" if path else str(source))
    for name, info in listed.items():
        path_below = name[len(root.rstrip("/")) :].lstrip("/")
        version = next((f"{key} {info[key]}" for key in _VALIDATORS if info.get(key)), "")
        try:
            yield File(path_below, info.get("size"), version=version)
        except (ValueError, BadRequest) as error:
            raise path_outside_source(path_below, str(source)) from error


_ERROR_CLASSES: tuple[tuple[type[Exception] | tuple[type[Exception], ...], type[TransientOriginError]], ...] = (
    ((ConnectionRefusedError, socket.gaierror), Unreachable),
    # Up to Python 3.10 asyncio's TimeoutError is not the built-in class; fsspec's own class derives from asyncio's.
    ((TimeoutError, asyncio.TimeoutError), Silent),
)


@contextmanager
def _translate_errors(source: Source) -> Iterator[None]:
    """Raise errors of back ends as errors of weightferry; fsspec asks back ends to raise built-in `OSError` classes."""
    subject = str(source)
    try:
        yield
    except (BadRequest, OriginError, SourceNotFound, AccessDenied):
        raise
    except FileNotFoundError as error:
        raise SourceNotFound(redact(f"does not exist: {error}"), subject=subject) from error
    except PermissionError as error:
        raise AccessDenied(
            redact(f"access denied: {error}. Check the credentials for this store on this rank"), subject=subject
        ) from error
    except (IsADirectoryError, NotADirectoryError) as error:
        raise SourceNotFound(redact(str(error)), subject=subject) from error
    except (OSError, asyncio.TimeoutError) as error:
        kind = next(
            (translated for original, translated in _ERROR_CLASSES if isinstance(error, original)), TransientOriginError
        )
        raise kind(redact(f"{type(error).__name__}: {error}"), subject=subject) from error
    except ValueError as error:
        # url_to_fs raises it for an unknown scheme.
        raise BadRequest(redact(str(error)), subject=subject) from error
    except Exception as error:
        # An error class of the back end's library, such as botocore's for an endpoint that does not answer.
        raise TransientOriginError(redact(f"{type(error).__name__}: {error}"), subject=subject) from error
