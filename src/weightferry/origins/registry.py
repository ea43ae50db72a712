"""Which origin serves which URL scheme: to add one, add a row."""

from __future__ import annotations

from importlib import import_module

from weightferry.origins.base import Origin
from weightferry.settings import Settings

# By scheme, the module and class that serve it; imported when they are used.
_ORIGINS = {
    "hf": "weightferry.origins.hub:HubOrigin",
    "http": "weightferry.origins.http:HttpOrigin",
    "https": "weightferry.origins.http:HttpOrigin",
    "file": "weightferry.origins.filesystem:FilesystemOrigin",
}
_FALLBACK = "weightferry.origins.fsspec:FsspecOrigin"


def origin_for(scheme: str, settings: Settings) -> Origin:
    """Create the origin for a URL scheme; fsspec serves every scheme without an implementation of its own.

    A scheme that fsspec does not know, or whose package is not installed, fails in `Origin.resolve`, with `BadRequest`.
    """
    module, _, name = _ORIGINS.get(scheme, _FALLBACK).partition(":")
    origin: Origin = getattr(import_module(module), name)(settings)
    return origin
