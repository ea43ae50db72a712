"""How files come into `collect_in`: the local strategy and the fetch configuration, as in SpeechBrain.

Objects of SpeechBrain's own classes of these names are understood too; SpeechBrain need not be installed.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import Any

from weightferry.errors import BadRequest


class LocalStrategy(Enum):
    """What `Pretrainer.collect_files` makes in `collect_in`, as in SpeechBrain."""

    SYMLINK = 1
    """A symbolic link ``NAME.ckpt`` to the file in the cache, or to a local source itself."""

    COPY = 2
    """A real file ``NAME.ckpt``. It is complete as soon as it has this name. The cache keeps its own copy."""

    COPY_SKIP_CACHE = 3
    """The same as `COPY`. SpeechBrain downloads to ``NAME.ckpt`` directly. Here, bytes always pass through the cache:
    that is where they are verified, and from where an interrupted download continues."""

    NO_LINK = 4
    """Nothing. The path in the cache is returned, or the path of the local source."""

    @classmethod
    def of(cls, given: object) -> LocalStrategy:
        """Return the strategy of this name; accepts SpeechBrain's enumeration too.

        Raises
        ------
        BadRequest
            `given` is no local strategy.
        """
        if is_local_strategy(given):
            return cls[given.name]  # type: ignore[attr-defined]
        raise BadRequest(
            f"local_strategy must be {', '.join(f'LocalStrategy.{each.name}' for each in cls)}, from weightferry or "
            f"speechbrain.utils.fetching; it is {given!r}"
        )


def is_local_strategy(given: object) -> bool:
    """Return whether an object is a local strategy, ours or SpeechBrain's."""
    is_of_class = isinstance(given, Enum) and type(given).__name__ == LocalStrategy.__name__
    return is_of_class and getattr(given, "name", None) in LocalStrategy.__members__


@dataclass(frozen=True)
class FetchConfig:
    """How `Pretrainer.collect_files` uses origins and existing files, as in SpeechBrain.

    Without a `FetchConfig`, `collect_files` compares every file in `collect_in` with its source, uses the token of this
    rank if it has one, and replaces files that differ.

    Attributes
    ----------
    overwrite : bool
        False: a file that exists in `collect_in` is used as it is, and its source is not looked at. With several ranks
        this needs the same file on every rank; otherwise the file is collected on all of them. True: every file is
        compared with its source, and replaced if it differs.
    allow_updates : bool
        True: the same as `overwrite`, for sources on the Hub only.
    allow_network : bool
        False: no request goes to any origin. Files of the Hub come from the caches of the nodes; a file of any other
        remote source must exist in `collect_in`.
    token : bool or str or None
        For the Hub. True: the token of this rank (``HF_TOKEN``, ``hf auth login``). False: no token is sent. A text:
        this token, on the ranks that pass it; it is never sent to other ranks. None: the token of this rank, if it has
        one and ``HF_HUB_DISABLE_IMPLICIT_TOKEN`` is not set.
    revision : str or None
        Branch, tag or commit of sources on the Hub; other sources ignore it.
    huggingface_cache_dir : str or Path or None
        A Hugging Face cache whose files are copied instead of downloaded. None: ``HF_HUB_CACHE``. Downloaded files go
        into the cache of weightferry.
    """

    overwrite: bool = False
    allow_updates: bool = False
    allow_network: bool = True
    token: bool | str | None = field(default=False, repr=False)
    revision: str | None = None
    huggingface_cache_dir: str | Path | None = None

    def __post_init__(self) -> None:
        for name in ("overwrite", "allow_updates", "allow_network"):
            self._check(name, bool)
        self._check("token", bool, str, type(None))
        self._check("revision", str, type(None))
        self._check("huggingface_cache_dir", str, Path, type(None))

    def _check(self, name: str, *types: type) -> None:
        value = getattr(self, name)
        if not isinstance(value, types) or value == "":
            expected = " or ".join("None" if kind is type(None) else kind.__name__ for kind in types)
            found = "an empty text" if value == "" else type(value).__name__
            raise BadRequest(f"{name} of FetchConfig must be {expected}, not {found}")

    @classmethod
    def of(cls, given: Any) -> FetchConfig | None:
        """Return the configuration with the same values; accepts SpeechBrain's dataclass too. None for None.

        Raises
        ------
        BadRequest
            `given` is no configuration, or a value in it has another type.
        """
        if given is None or isinstance(given, FetchConfig):
            return given
        names = [spec.name for spec in fields(cls)]
        if isinstance(given, type) or not all(hasattr(given, name) for name in names):
            raise BadRequest(
                "fetch_config must be None or a FetchConfig, from weightferry or speechbrain.utils.fetching; it is of "
                f"type {type(given).__name__}"
            )
        return cls(**{name: getattr(given, name) for name in names})
