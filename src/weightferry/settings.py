"""All limits and switches in one frozen value, each also an environment variable."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from weightferry.errors import BadRequest

PREFIX = "WEIGHTFERRY_"
_MAY_BE_ZERO = _SIZES = {"min_free", "max_size"}


@dataclass(frozen=True)
class Settings:
    """Limits of an operation; equal on all ranks, or the strictest one speaks first.

    Every field may be set by an environment variable: ``WEIGHTFERRY_`` and the field's name in capitals. What the
    caller passes wins over the environment, which wins over the default.

    Attributes
    ----------
    cache_dir : Path
        The cache folder of this rank. Default ``$XDG_CACHE_HOME/weightferry``, else ``~/.cache/weightferry``. On a
        cluster name a node-local folder (``/local/...``) where there is one.
    cache_group : str
        Name of the group that a new cache folder is for: all in it read and write there. Empty: it is this user's
        alone, so that a gated model which one may read does not become readable to others. A folder that is there
        already keeps its own rights, which what is made in it follows. Default empty.
    cache_tiers : tuple of Path
        Other caches, as an administrator keeps them for all, looked at first and only read: what they hold is used
        where it is. As a variable separated by commas; those that are not there are left out. Default none.
    connections : int
        Connections over which one leader reads at a time, at most: each time an origin says that it is too busy (HTTP
        429, 503, 529) they are halved, and grow back one by one with its answers. Default 4.
    connect_timeout, read_timeout : float
        Seconds to wait for a connection, and for the next bytes on one, before it is given up and tried again.
        Default 10 and 30.
    stall_timeout : float
        Seconds that bytes may stand still before an operation is given up. A connection without bytes is opened anew
        after `read_timeout`, or a third of this where that is less. Default 300.
    retries : int
        How often in a row a read is tried again after a refusal or a broken connection, without a byte having come,
        before the error is final; silence is limited by `stall_timeout` instead. Default 5.
    retry_wait : float
        Seconds before the first of these retries; doubled each time up to 60, with jitter. An origin's
        ``Retry-After`` is honoured when it asks for more. Default 0.5.
    beat_interval : float
        Seconds between two signs of life of a rank. Default 2.
    beat_timeout : float
        Seconds without a sign of life after which a rank counts as dead. Default 15.
    agree_timeout : float
        Seconds that ranks wait for the last one to call. Default 600.
    lock_timeout : float
        Seconds to wait for another job's lock on a file before reading it from the origin all the same: the lock
        saves bandwidth, correctness does not rest on it. Where holders give signs of life, on file systems that other
        machines see too or that have no locks of their own, one that gives none for `beat_timeout` and
        `visibility_timeout` together is not waited for. Default 1800.
    visibility_timeout : float
        Seconds that a file which is there may take to show on another machine: network file systems keep what they
        know of a folder for a while. Default 60.
    domain : str
        Ranks with the same text share one cache folder, others do not; empty: it is found out. What contradicts it is
        an error. Default empty.
    partial_ttl : float
        Seconds after which a partial file that nobody writes to any more is removed. Default 86400.
    min_free : int
        Bytes that stay free on the file system of a cache; as a variable also with a unit, ``50GB``. Default 0.
    max_size : int
        Bytes that the content of a cache may have; as a variable also with a unit. What is missing makes room for
        itself: what was staged longest ago is evicted, but for what living processes use. 0: no limit, and nothing is
        ever evicted. Default 0.
    allow_globals : tuple of str
        ``module.name`` of what pickles may use beyond tensors and plain containers, in every file; as a variable
        separated by commas. Default none. See `LoadOptions` to allow it for one file.
    """

    cache_dir: Path = field(default_factory=lambda: default_cache_dir(os.environ))
    cache_group: str = ""
    cache_tiers: tuple[Path, ...] = ()
    connections: int = 4
    connect_timeout: float = 10.0
    read_timeout: float = 30.0
    stall_timeout: float = 300.0
    retries: int = 5
    retry_wait: float = 0.5
    beat_interval: float = 2.0
    beat_timeout: float = 15.0
    agree_timeout: float = 600.0
    lock_timeout: float = 1800.0
    visibility_timeout: float = 60.0
    domain: str = ""
    partial_ttl: float = 86400.0
    min_free: int = 0
    max_size: int = 0
    allow_globals: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for spec in fields(self):
            value = getattr(self, spec.name)
            if isinstance(value, int | float) and not (value > 0 or (value == 0 and spec.name in _MAY_BE_ZERO)):
                raise BadRequest(f"setting {spec.name} must be above 0, it is {value}")
        if self.beat_timeout < 2 * self.beat_interval:
            raise BadRequest(
                f"beat_timeout ({self.beat_timeout} s) must be at least twice beat_interval ({self.beat_interval} s)"
            )

    @classmethod
    def from_environ(cls, environ: Mapping[str, str] | None = None, **given: Any) -> Settings:
        """Read the settings from the environment; `given` values that are not None win.

        Raises
        ------
        BadRequest
            A variable does not hold a number, or a number that makes no sense.
        """
        environ = os.environ if environ is None else environ
        values: dict[str, Any] = {"cache_dir": default_cache_dir(environ)}
        for spec in fields(cls):
            text = environ.get(PREFIX + spec.name.upper())
            if text and spec.name != "cache_dir":
                values[spec.name] = _parsed(spec.name, text, str(spec.type))
        values.update({name: value for name, value in given.items() if value is not None})
        values["cache_dir"] = Path(values["cache_dir"]).expanduser().absolute()
        tiers = values.get("cache_tiers", ())
        values["cache_tiers"] = tuple(Path(tier).expanduser().absolute() for tier in tiers)
        return cls(**values)


def default_cache_dir(environ: Mapping[str, str]) -> Path:
    """Where the cache is when nobody says: the XDG cache folder's ``weightferry``."""
    named = environ.get(PREFIX + "CACHE_DIR")
    if named:
        return Path(named).expanduser().absolute()
    xdg = environ.get("XDG_CACHE_HOME")
    return (Path(xdg) if xdg else Path.home() / ".cache") / "weightferry"


def byte_count(text: str) -> int:
    """Read a size: ``1000``, ``50GB``, ``1.5TiB``.

    Raises
    ------
    ValueError
        It is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(?:([kKMGT])(i?))?B?", text.strip())
    if not match:
        raise ValueError(f"not a size: {text!r}; write 1000, 50GB or 1.5TiB")
    number, unit, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** (" KMGT".index(unit.upper()) if unit else 0))


def _parsed(name: str, text: str, kind: str) -> Any:
    if kind == "str":
        return text
    if kind.startswith("tuple"):
        return tuple(part.strip() for part in text.split(",") if part.strip())
    try:
        if name in _SIZES:
            return byte_count(text)
        return int(text) if kind == "int" else float(text)
    except ValueError:
        kind = "a size" if name in _SIZES else "a whole number" if kind == "int" else "a number"
        raise BadRequest(f"{PREFIX}{name.upper()} must be {kind}, it is {text!r}") from None
