"""Settings: all limits and switches in one frozen value, each also an environment variable."""

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
_SWITCHES = {"0": False, "false": False, "no": False, "off": False, "1": True, "true": True, "yes": True, "on": True}


@dataclass(frozen=True)
class Settings:
    """The limits and switches of an operation. Pass equal values on all ranks.

    Every field can be set by an environment variable: ``WEIGHTFERRY_`` and the name of the field in capitals. An
    argument of the caller wins over the environment, and the environment over the default. If the values differ between
    ranks, the strictest one takes effect first.

    Attributes
    ----------
    cache_dir : Path
        Cache folder of this rank. On a cluster set it to a folder on a node-local disk (``/local/...``), if the nodes
        have one. Default ``$XDG_CACHE_HOME/weightferry``, else ``~/.cache/weightferry``.
    cache_group : str
        Name of the Unix group that shares a new cache folder: its members can read and write everything in it. If
        empty, only this user can access a new cache, so that other users cannot read gated models that this user may
        read. An existing folder keeps its permissions, and new files in it follow them. Default empty.
    cache_tiers : tuple of Path
        Further caches, such as one that an administrator maintains for all users. They are searched first and never
        written to. A file in one of them is used where it is. In the environment variable, separate folders by commas.
        A folder that does not exist is ignored. Default none.
    connections : int
        Maximum number of connections over which one leader reads from an origin at the same time. When the origin
        answers that it is too busy (HTTP 429, 503 or 529), the leader halves the number in use; each completed read
        then adds one again. Default 4.
    connect_timeout, read_timeout : float
        Seconds to wait for a new connection, and for the next bytes on a connection, before it is closed and the
        request is sent again. Default 10 and 30.
    stall_timeout : float
        Seconds without any byte after which an operation fails. A connection without bytes is replaced after
        `read_timeout`, or after a third of `stall_timeout` if that is less. Default 300.
    retries : int
        How many times in a row a read is retried after an error or a broken connection, if no byte arrives in between.
        Timeouts without bytes do not count; `stall_timeout` limits those. Default 5.
    retry_wait : float
        Seconds before the first of these retries. Each further wait is twice as long, up to 60 seconds, with jitter. A
        longer ``Retry-After`` of the origin is respected. Default 0.5.
    beat_interval : float
        Seconds between two heartbeats of a rank. Default 2.
    beat_timeout : float
        Seconds without a heartbeat after which a rank counts as dead; at least twice `beat_interval`. Default 15.
    agree_timeout : float
        Seconds that ranks wait until the last rank makes the call. Default 600.
    lock_timeout : float
        Seconds to wait for a file lock of another job. After that the file is downloaded without the lock: locks only
        save bandwidth, correctness does not depend on them. On a file system that other machines see, or without file
        locks of its own, the holder of a lock sends heartbeats; if they stop for `beat_timeout` plus
        `visibility_timeout` seconds, the wait ends early. Default 1800.
    visibility_timeout : float
        Seconds that a new file may need to appear on another machine: clients of network file systems cache the
        content of folders. Default 60.
    domain : str
        Ranks with the same text share one cache folder, ranks with different texts do not. If empty, weightferry
        probes which ranks share a folder. A text that contradicts the probe is an error. Default empty.
    partial_ttl : float
        Seconds without a write after which a partial file is removed. Default 86400.
    min_free : int
        Bytes to keep free on the file system of a cache. The environment variable accepts a unit: ``50GB``. Default 0.
    max_size : int
        Maximum size of the content of a cache in bytes. The environment variable accepts a unit. To make room for
        missing files, the content that was staged longest ago is evicted, but none that a running process uses. 0 means
        no limit: nothing is ever evicted. Default 0.
    offline_fallback : bool
        Whether a branch or tag of the Hub is taken to be at the commit that the caches know, with one warning for the
        job, when the Hub gives no answer within `connect_timeout`, at most 3.5 s. False (in the environment variable
        ``0``): then the request is retried, and fails with `OriginUnreachable`. A refusal of the Hub always fails. A
        full commit id is not looked up. Default True.
    allow_globals : tuple of str
        Names (``module.name``) that a pickle may use in addition to tensors and plain containers, for every file. In
        the environment variable, separate them by commas. `LoadOptions` allows names for a single file. Default none.
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
    offline_fallback: bool = True
    allow_globals: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for spec in fields(self):
            value = getattr(self, spec.name)
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if is_number and not (value > 0 or (value == 0 and spec.name in _MAY_BE_ZERO)):
                least = "0 or more" if spec.name in _MAY_BE_ZERO else "above 0"
                raise BadRequest(f"setting {spec.name} is {value}, but must be {least}")
        if self.beat_timeout < 2 * self.beat_interval:
            raise BadRequest(
                f"setting beat_timeout is {self.beat_timeout} s, but must be at least twice beat_interval "
                f"({self.beat_interval} s)"
            )

    @classmethod
    def from_environ(cls, environ: Mapping[str, str] | None = None, **given: Any) -> Settings:
        """Return the settings of the environment; a value in `given` that is not None wins over the environment.

        Raises
        ------
        BadRequest
            A variable is not a number, a size or a switch as it must be, or a value is out of range.
        """
        environ = os.environ if environ is None else environ
        values: dict[str, Any] = {"cache_dir": default_cache_dir(environ)}
        for spec in fields(cls):
            text = environ.get(PREFIX + spec.name.upper())
            if text and spec.name != "cache_dir":
                values[spec.name] = _parse(spec.name, text, str(spec.type))
        values.update({name: value for name, value in given.items() if value is not None})
        values["cache_dir"] = Path(values["cache_dir"]).expanduser().absolute()
        tiers = values.get("cache_tiers", ())
        values["cache_tiers"] = tuple(Path(tier).expanduser().absolute() for tier in tiers)
        return cls(**values)


def default_cache_dir(environ: Mapping[str, str]) -> Path:
    """Return the cache folder if the caller gives none.

    It is ``WEIGHTFERRY_CACHE_DIR``, else ``weightferry`` in the XDG cache folder.
    """
    from_variable = environ.get(PREFIX + "CACHE_DIR")
    if from_variable:
        return Path(from_variable).expanduser().absolute()
    xdg = environ.get("XDG_CACHE_HOME")
    return (Path(xdg) if xdg else Path.home() / ".cache") / "weightferry"


def byte_count(text: str) -> int:
    """Return the bytes of a size such as ``1000``, ``50GB`` or ``1.5TiB``.

    Raises
    ------
    ValueError
        The text is not a size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(?:([kKMGT])(i?))?B?", text.strip())
    if not match:
        raise ValueError(f"not a size: {text!r}; write 1000, 50GB or 1.5TiB")
    number, unit, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** (" KMGT".index(unit.upper()) if unit else 0))


def _parse(name: str, text: str, type_name: str) -> Any:
    if type_name == "str":
        return text
    if type_name.startswith("tuple"):
        return tuple(part.strip() for part in text.split(",") if part.strip())
    if type_name == "bool":
        if text.strip().lower() not in _SWITCHES:
            raise BadRequest(f"{PREFIX}{name.upper()} is {text!r}, but must be 0 or 1")
        return _SWITCHES[text.strip().lower()]
    try:
        if name in _SIZES:
            return byte_count(text)
        return int(text) if type_name == "int" else float(text)
    except ValueError:
        expected = "a size such as 50GB" if name in _SIZES else "a whole number" if type_name == "int" else "a number"
        raise BadRequest(f"{PREFIX}{name.upper()} is {text!r}, but must be {expected}") from None
