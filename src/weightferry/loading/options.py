"""Options for loading one loadable."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from weightferry.errors import LoadError

T = TypeVar("T")


@dataclass(frozen=True)
class LoadOptions:
    """Options for loading one loadable.

    Attributes
    ----------
    strict : bool
        Missing and unexpected keys of a module raise an error instead of a warning.
    rename : mapping of str to str, or callable, or None
        From keys in the file to keys in the module. A key of the mapping is a whole key of the file, or with a dot at
        its end a prefix; the longest matching prefix wins. A callable is called for each key of the file; it returns
        None to leave the tensor out.
    device : str or None
        The device on which tensors of a module that are on the meta device get memory; None: the CPU. For the GPU of a
        rank, give its index: ``cuda:1``.
    allow_globals : tuple of str
        ``module.name`` of each class or function that the pickle in this file may import, beyond tensors and
        containers. They are allowed for this file only, in addition to those in `Settings`.
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
            raise TypeError(f"allow_globals must be a list of names, not one name: write [{given!r}]")
        object.__setattr__(self, "allow_globals", tuple(self.allow_globals))

    @property
    def for_modules(self) -> bool:
        """Whether any option is set that applies only to modules."""
        return self.strict or self.rename is not None or self.device is not None


DEFAULT_OPTIONS = LoadOptions()


def rename_keys(
    state: Mapping[str, T], rename: Mapping[str, str] | Callable[[str], Any] | None, subject: str
) -> Mapping[str, T]:
    """Return `state` under the new keys, in the same order.

    Parameters
    ----------
    subject
        The file, for errors.

    Raises
    ------
    LoadError
        Two tensors would get the same key.
    """
    if rename is None:
        return state
    new_key = rename if callable(rename) else _by_mapping(rename)
    result: dict[str, T] = {}
    old_keys: dict[str, str] = {}
    for key, value in state.items():
        name = new_key(key)
        if name is None:
            continue
        if name in old_keys:
            raise LoadError(
                f"{subject}: {old_keys[name]!r} and {key!r} would both be renamed to {name!r}; "
                "change LoadOptions(rename=...)",
                subject=subject,
            )
        old_keys[name] = key
        result[name] = value
    return result


def _by_mapping(rename: Mapping[str, str]) -> Callable[[str], str]:
    prefixes = sorted((key for key in rename if key.endswith(".")), key=len, reverse=True)

    def new_key(key: str) -> str:
        if key in rename:
            return rename[key]
        prefix = next((prefix for prefix in prefixes if key.startswith(prefix)), None)
        return key if prefix is None else rename[prefix] + key.removeprefix(prefix)

    return new_key
