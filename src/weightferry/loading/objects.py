"""Load one file into one object, by the first hook that knows how."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from torch import nn

from weightferry.errors import CollectError, LoadError, NoHook, redact
from weightferry.loading.hooks import PREPARES
from weightferry.loading.keys import unwrap
from weightferry.loading.options import DEFAULT, LoadOptions
from weightferry.loading.registry import (
    DEFAULT_LOAD_HOOKS,
    DEFAULT_TRANSFER_HOOKS,
    LOADER_MARK,
    TRANSFER_MARK,
    Hook,
    fallback,
    find_hook,
)

if TYPE_CHECKING:
    import os
    from collections.abc import Callable

    PathLike: TypeAlias = str | os.PathLike[str]

T = TypeVar("T")


def load_object(
    name: str, obj: Any, path: PathLike, custom_hook: Hook | None = None, options: LoadOptions = DEFAULT
) -> None:
    """Load a file into an object: by its custom hook, else its type's transfer hook, else its type's load hook.

    Parameters
    ----------
    name
        The loadable's name, for errors.
    obj
        Any object; if a wrapped module (DistributedDataParallel, DataParallel, torch.compile), the hook of the class
        inside is taken and gets the module inside. A custom hook gets `obj` as it is.
    path
        A local file; given to the hook as it is.
    custom_hook
        Called as ``custom_hook(obj, path)``.

    Raises
    ------
    NoHook
        Nobody knows how to load an object of this type.
    LoadError
        The hook failed; names loadable and file. Errors of our own classes pass as they are.
    """
    prepare_object(name, obj, path, custom_hook, options)()


def prepare_object(
    name: str, obj: Any, path: PathLike, custom_hook: Hook | None = None, options: LoadOptions = DEFAULT
) -> Callable[[], None]:
    """Check all that `load_object` can check before it writes, and return what writes.

    Hooks of others are only found: what they refuse shows when they are called.

    Raises
    ------
    LoadError
        As for `load_object`.
    """
    hook, target, ending = _bind(name, obj, custom_hook)
    prepare = PREPARES.get(hook)
    if prepare is None:
        if options.for_modules:
            raise LoadError(f"{name!r} is loaded by {hook!r}, which knows of no options: {options}", subject=name)
        return lambda: _named(name, path, lambda: hook(target, path, *ending))
    if options.for_modules and not isinstance(target, nn.Module):
        raise LoadError(f"{name!r} is no module, and these options are for modules: {options}", subject=name)
    commit = _named(name, path, lambda: prepare(target, path, options))
    return lambda: _named(name, path, commit)


def check_loadable(name: str, obj: Any, custom_hook: Hook | None = None) -> None:
    """Find the hook that `load_object` would take, and do nothing with it.

    Raises
    ------
    NoHook
        There is none.
    """
    _bind(name, obj, custom_hook)


def _named(name: str, path: PathLike, work: Callable[[], T]) -> T:
    try:
        return work()
    except CollectError:
        raise
    except Exception as error:
        text = f"loading {name!r} from {path} failed: {type(error).__name__}: {error}"
        raise LoadError(redact(text), subject=str(path)) from error


def _bind(name: str, obj: Any, custom_hook: Hook | None) -> tuple[Hook, Any, tuple[bool, ...]]:
    """Return the hook, the object it is called with, and what follows the path: `end_of_epoch` for a load hook."""
    if custom_hook is not None:
        if not callable(custom_hook):
            raise NoHook(f"the custom hook of {name!r} is a {type(custom_hook).__name__}, which cannot be called")
        return custom_hook, obj, ()
    target = _target(obj)
    if (transfer := find_hook(target, DEFAULT_TRANSFER_HOOKS, TRANSFER_MARK)) is not None:
        return transfer, target, ()
    if (load := find_hook(target, DEFAULT_LOAD_HOOKS, LOADER_MARK)) is not None:
        return load, target, (False,)
    if (other := fallback(target)) is not None:
        return other, target, ()
    raise NoHook(_how_to_register(name, obj))


def _target(obj: Any) -> Any:
    registered = type(obj) in DEFAULT_TRANSFER_HOOKS or type(obj) in DEFAULT_LOAD_HOOKS
    return unwrap(obj) if isinstance(obj, nn.Module) and not registered else obj


def _how_to_register(name: str, obj: Any) -> str:
    kind = type(obj)
    return (
        f"nobody knows how to load {name!r}, an object of type {kind.__module__}.{kind.__qualname__}. "
        "Three ways to say it:\n"
        f"  for this object: Pretrainer(..., custom_hooks={{{name!r}: hook}}), called as hook(obj, path)\n"
        f"  in its class: @register_checkpoint_hooks on {kind.__qualname__}, and @mark_as_transfer on the method "
        "(self, path) that loads it\n"
        f"  for its type: weightferry.DEFAULT_TRANSFER_HOOKS[{kind.__qualname__}] = hook"
    )
