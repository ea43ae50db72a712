"""What may be said about how one loadable is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from weightferry.errors import LoadError

T = TypeVar("T")


@dataclass(frozen=True)
class LoadOptions:
    """How one loadable is loaded, where the default is not what is wanted.

    Attributes
    ----------
    strict : bool
        Missing and unexpected keys of a module are an error, instead of a warning.
    rename : mapping of str to str, or callable, or None
        From names in the file to names in the module. A key of a mapping is a whole name, or with a dot at its end the
        beginning of names; the longest that fits counts. A callable is asked for each name; None leaves the tensor out.
    device : str or None
        Where the tensors of a module come to be that are on the meta device; None: on the CPU. Name a rank's GPU with
        its index.
    allow_globals : tuple of str
        ``module.name`` of each class or function that the pickle in this file may use beyond tensors and containers.
        Allowed is exactly that, for this file, beside those in `Settings`.
    rank_specific : bool
        Ranks load different values: `Pretrainer.load_collected` does not compare them.
    """

    strict: bool = False
    rename: Mapping[str, str] | Callable[[str], str | None] | None = field(default=None, repr=False)
    device: str | None = None
    allow_globals: tuple[str, ...] = ()
    rank_specific: bool = False

    def __post_init__(self) -> None:
        if isinstance(given := self.allow_globals, str):  # type: ignore[unreachable]
            raise TypeError(f"allow_globals is a list of names, not one: [{given!r}]")
        object.__setattr__(self, "allow_globals", tuple(self.allow_globals))

    @property
    def for_modules(self) -> bool:
        """Whether something is said that only modules know."""
        return self.strict or self.rename is not None or self.device is not None


DEFAULT = LoadOptions()


def renamed(
    state: Mapping[str, T], rename: Mapping[str, str] | Callable[[str], Any] | None, subject: str
) -> Mapping[str, T]:
    """Return `state` under other names, in the same order; `subject` is the file, for errors.

    Raises
    ------
    LoadError
        Two tensors would have one name.
    """
    if rename is None:
        return state
    name_of = rename if callable(rename) else _by_mapping(rename)
    result: dict[str, T] = {}
    taken: dict[str, str] = {}
    for key, value in state.items():
        name = name_of(key)
        if name is None:
            continue
        if name in taken:
            raise LoadError(f"{taken[name]!r} and {key!r} would both be renamed to {name!r}", subject=subject)
        taken[name] = key
        result[name] = value
    return result


def _by_mapping(rename: Mapping[str, str]) -> Callable[[str], str]:
    prefixes = sorted((key for key in rename if key.endswith(".")), key=len, reverse=True)

    def name_of(key: str) -> str:
        if key in rename:
            return rename[key]
        prefix = next((prefix for prefix in prefixes if key.startswith(prefix)), None)
        return key if prefix is None else rename[prefix] + key.removeprefix(prefix)

    return name_of


def union(*allowed: Iterable[str]) -> tuple[str, ...]:
    """Join lists of allowed globals, sorted."""
    return tuple(sorted({name for names in allowed for name in names}))
